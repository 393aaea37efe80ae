"""Nothing is left behind: hooks, graphs, memory."""

import gc
import tracemalloc
import weakref

import pytest
import torch
from torch import nn

import fastminima as fm


def setup():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, torch.randn(8, 6)


def graph_of(losses):
    """All nodes of the graph, as the engine would visit them."""
    nodes = [losses.grad_fn]
    for node in nodes:
        nodes += [c for c, _ in node.next_functions if c is not None and c not in nodes]
    return nodes


class Bomb:
    """Raises in the backward pass, at a chosen node."""

    def __init__(self, error):
        self.error = error

    def __call__(self, *grads):
        raise self.error


@pytest.mark.parametrize("where", range(9))
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_interrupted_anywhere(where, error):
    model, x = setup()
    probe = fm.GradientProbe(model)
    want = probe.backward(model(x).square().sum(1))
    grads = [p.grad.clone() for p in model.parameters()]
    keep = [p.expand_as(p).grad_fn.next_functions[0][0] for p in model.parameters()]
    losses = model(x).square().sum(1)
    nodes = graph_of(losses)
    nodes[where % len(nodes)].register_prehook(Bomb(error))
    model.zero_grad()
    with pytest.raises(type(error)):
        probe.backward(losses)
    del losses, nodes
    gc.collect()
    model.zero_grad()
    # The accumulators outlive the graph here, as under DistributedDataParallel; a hook
    # left on one of them would raise or count twice.
    if not any(has_bomb(model, x) for _ in range(1)):
        model.zero_grad()
        got = probe.backward(model(x).square().sum(1))
        assert torch.equal(got.sq_norms, want.sq_norms)
        for p, g in zip(model.parameters(), grads, strict=True):
            assert torch.equal(p.grad, g)
    del keep


def has_bomb(model, x):
    """Whether the bomb itself sat on an accumulator that is still alive."""
    try:
        model(x).square().sum(1).mean().backward()
    except (RuntimeError, KeyboardInterrupt):
        return True
    return False


def test_graph_is_freed_without_the_garbage_collector():
    model, x = setup()
    probe = fm.GradientProbe(model, measure=("norms", "gram"), keep_mean=True)

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            ctx.mark = Mark()
            Marked.alive = weakref.ref(ctx.mark)
            return t.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    class Mark:
        pass

    gc.collect()
    gc.disable()
    try:
        for _ in range(2):  # with and without the measurement of a new structure
            probe.backward(Marked.apply(model(x)).square().sum(1))
            assert Marked.alive() is None
        # Attached and never run: dropping probe's hold frees it too.
        losses = Marked.apply(model(x)).square().sum(1)
        probe.attach(losses)
        probe._detach()
        del losses
        assert Marked.alive() is None
    finally:
        gc.enable()


def test_many_steps_keep_memory_flat():
    model, x = setup()
    probe = fm.GradientProbe(model)
    tracemalloc.start()
    for _ in range(300):  # what is allocated once, and allocators' free lists
        probe.backward(model(x).square().sum(1))
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(300):
        probe.backward(model(x).square().sum(1))
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 20_000, f"{grown} bytes more after 300 steps"


def test_the_probe_leaves_no_hook_on_the_model():
    model, x = setup()
    probe = fm.GradientProbe(model)
    probe.backward(model(x).square().sum(1))
    for module in model.modules():
        for name, value in vars(module).items():
            if "hook" in name and isinstance(value, dict):
                assert not value, name
    for p in model.parameters():
        assert not p._backward_hooks
        assert not getattr(p, "_post_accumulate_grad_hooks", None)
