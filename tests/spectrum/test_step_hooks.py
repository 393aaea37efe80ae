"""Hooks of every kind in a training step that is differentiated further."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_full_backward_hook

import fastminima as fm


def dense(device):
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)
    model = nn.Sequential(*layers).to(device)
    x = torch.randn(32, 6, device=device)
    return model, (x, torch.randint(3, (32,), device=device))


def losses_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def of_module(model, met):
    model[1].register_full_backward_hook(lambda *_: met.append("full"))


def scaling(model, met):
    model[1].register_full_backward_hook(lambda _, into, __: (2 * into[0],))


def before_module(model, met):
    model[2].register_full_backward_pre_hook(lambda _, grads: met.append(grads[0]))


def in_the_old_way(model, met):
    model[1].register_backward_hook(lambda *_: met.append("old"))


def on_activation(model, met):
    def forward(module, inputs, output):
        output.register_hook(lambda grad: met.append(grad) or 2 * grad)

    model[0].register_forward_hook(forward)


def on_several(model, met):
    def forward(module, inputs, output):
        hook = torch.autograd.graph.register_multi_grad_hook
        hook([output, *inputs], lambda grads: met.append(grads[0]))

    model[2].register_forward_hook(forward)


def on_leaf(model, met):
    def forward(module, inputs, output):
        handle = module.weight.register_hook(lambda grad: met.append(grad) or 3 * grad)
        handles.append(handle)

    handles = []
    model[0].register_forward_hook(forward)


def retaining(model, met):
    def forward(module, inputs, output):
        output.retain_grad()
        met.append(output)

    model[0].register_forward_hook(forward)


KINDS = (
    *(of_module, scaling, before_module, in_the_old_way, on_activation),
    *(on_several, on_leaf, retaining),
)


@pytest.mark.parametrize("put", KINDS, ids=lambda put: put.__name__)
@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_run_as_in_a_plain_step(put, device):
    """Once, for the same gradients, which they change as ever; values are without."""
    model, batch = dense(device)
    expected = fm.SharpnessProbe(model)(loss=losses_of(model, batch))
    twin = copy.deepcopy(model)
    runs = []
    for net in (model, twin):
        met = []
        put(net, met)
        sharpness = fm.SharpnessProbe(net)
        for _ in range(2):
            with fm.twice_differentiable():
                losses = losses_of(net, batch)
            if net is model:
                pairs = sharpness.backward(losses)
                torch.testing.assert_close(
                    pairs.values, expected.values, rtol=2e-2, atol=0
                )
            else:
                losses.mean().backward()
        met = [getattr(x, "grad", x) if put is retaining else x for x in met]
        runs.append([*met, *(p.grad for p in net.parameters())])
    assert len(runs[0]) == len(runs[1])
    for mine, plain in zip(*runs, strict=True):
        if isinstance(mine, str):
            assert mine == plain
        else:
            assert torch.equal(mine, plain)
            assert not mine.requires_grad


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hook_of_all_modules(device):
    model, batch = dense(device)
    met = []
    handle = register_module_full_backward_hook(lambda *_: met.append(1))
    try:
        fm.SharpnessProbe(model).backward(losses_of(model, batch))
    finally:
        handle.remove()
    assert len(met) == 4


def test_products_alone_run_no_hooks(device):
    """And leave those that there are for the backward pass that follows."""
    model, batch = dense(device)
    met = []
    of_module(model, met)
    losses = losses_of(model, batch)
    fm.SharpnessProbe(model)(loss=losses)
    assert not met
    losses.mean().backward()
    assert met == ["full"]


@pytest.mark.parametrize("put", [of_module, on_activation], ids=["module", "tensor"])
def test_statistics_of_a_step_with_hooks(put, device):
    """As of a plain step, in which a new probe runs hooks more often itself."""
    found, calls = [], []
    for is_plain in (True, False):
        model, batch = dense(device)
        met = []
        put(model, met)
        probe, sharpness = fm.GradientProbe(model), fm.SharpnessProbe(model)
        for _ in range(2):
            with fm.twice_differentiable():
                losses = losses_of(model, batch)
            probe.attach(losses)
            if is_plain:
                losses.mean().backward()
            else:
                sharpness.backward(losses)
            found.append(probe.collect().sq_norms)
            calls.append(len(met))
    assert calls[:2] == calls[2:]
    for plain, mine in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(mine, plain)
