"""What changes between two steps of a known graph without changing its structure."""

import pytest
import torch
from oracles import single_sample_gradients
from torch import nn

import fastminima as fm


def assert_norms(stats, want):
    scale = max(g.flatten(1).square().sum(1).max() for g in want.values()).clamp_min(1)
    for name, g in want.items():
        got = stats.sq_norms_by_parameter[name].double()
        exact = g.flatten(1).square().sum(1)
        torch.testing.assert_close(got / scale, exact / scale, rtol=1e-5, atol=1e-8)


def steps(probe, model, losses, batch, count=7):
    """Some steps, each compared with the gradients of single samples."""
    want = single_sample_gradients(model, losses, batch)
    for _ in range(count):
        model.zero_grad()
        assert_norms(probe.backward(losses(model, batch)), want)


def _dense(model, batch):
    return model(batch[0]).square().flatten(1).sum(1)


class Affine(nn.Module):
    """A product, a shift and a scale, all of one's own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))
        self.shift = nn.Parameter(torch.randn(5))
        self.scale = nn.Parameter(torch.randn(5))

    def forward(self, x):
        return (x @ self.weight + self.shift) * self.scale


# Parameters given other shapes, with outputs of the same ones.
RESHAPED = {
    "inputs": (nn.Linear, (3, 5), "weight", (5, 9), (6, 3), (6, 9)),
    "bias": (nn.Linear, (3, 5), "bias", (1,), (6, 3), (6, 3)),
    "shift": (Affine, (), "shift", (1,), (6, 3), (6, 3)),
    "scale": (Affine, (), "scale", (1,), (6, 3), (6, 3)),
    "kernel": (nn.Conv2d, (2, 3, 3, 2), "weight", (3, 2, 4, 4), *[(4, 2, 8, 8)] * 2),
}


@pytest.mark.parametrize("name", RESHAPED)
def test_a_parameter_in_another_shape(name):
    make, arguments, parameter, shape, before, after = RESHAPED[name]
    torch.manual_seed(0)
    model = make(*arguments)
    probe = fm.GradientProbe(model, per_parameter=True)
    own = model.get_parameter(parameter).data
    steps(probe, model, _dense, [torch.randn(before)])
    model.get_parameter(parameter).data = torch.randn(shape)
    steps(probe, model, _dense, [torch.randn(after)])
    model.get_parameter(parameter).data = own
    steps(probe, model, _dense, [torch.randn(before)])


def layers():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.LayerNorm(6)
    )


def test_views_that_are_negated_when_they_are_read():
    """Their memory holds the other sign, which a mean is not taken from."""
    model, ids = layers(), torch.randint(11, (5, 7))

    def losses(model, batch, turn=torch._neg_view):
        x = batch[0]
        for layer in model:
            x = turn(layer(x))
        return x.square().sum((1, 2))

    probe = fm.GradientProbe(model, per_parameter=True)
    steps(probe, model, lambda m, b: losses(m, b, torch.neg), [ids], 6)
    steps(probe, model, losses, [ids])


def _strided(g):
    return torch.stack([g, g], -1)[..., 0]


def _time_first(g):
    return g.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize(
    "turn", [lambda g: torch._neg_view(-g), _strided, _time_first], ids=range(3)
)
def test_gradients_that_lie_otherwise_in_memory(turn):
    model, ids = layers(), torch.randint(11, (5, 7))
    turning = []

    def losses(model, batch):
        x = batch[0]
        for layer in model:
            x = layer(x)
            for turn in turning:
                x.register_hook(turn)
        return x.square().sum((1, 2))

    probe = fm.GradientProbe(model, per_parameter=True)
    steps(probe, model, losses, [ids])
    turning.append(turn)
    steps(probe, model, losses, [ids])


def zeros_without_memory(g):
    return torch._efficientzerotensor(g.shape, dtype=g.dtype, device=g.device)


@pytest.mark.parametrize("layer", range(4))
def test_gradients_of_zeros_without_memory(layer, not_apart):
    """As autograd makes them for what surely is zero."""
    model, ids = layers(), torch.randint(11, (5, 7))
    probe = fm.GradientProbe(model, per_parameter=True)
    for step in range(7):
        model.zero_grad()
        x = ids
        for i, each in enumerate(model):
            x = each(x)
            if i == layer and step > 4:
                x.register_hook(zeros_without_memory)
        norms = probe.backward(x.square().sum((1, 2))).sq_norms_by_parameter
        for name, of_parameter in norms.items():
            is_below = step > 4 and int(name.split(".")[0]) <= layer
            assert bool((of_parameter == 0).all()) == is_below


class Prompted(nn.Module):
    """A layer whose outputs are scaled with a tensor of somebody's."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.prompt = torch.randn(4, requires_grad=True)

    def forward(self, x):
        return self.layer(x) * self.prompt


def test_a_leaf_that_becomes_a_parameter(not_apart):
    torch.manual_seed(0)
    model, x = Prompted(), torch.randn(6, 3)
    probe = fm.GradientProbe(model, per_parameter=True)
    for _ in range(7):
        model.zero_grad()
        probe.backward(_dense(model, [x]))
    prompt = model.prompt.detach()
    del model.prompt
    model.prompt = nn.Parameter(prompt)
    steps(probe, model, _dense, [x])


def test_what_is_refused_once_is_refused_in_every_step():
    torch.manual_seed(0)
    table, ids = nn.Embedding(9, 4), torch.randint(9, (5, 6))
    probe = fm.GradientProbe(table, per_parameter=True)
    steps(probe, table, lambda m, b: m(b[0]).square().sum((1, 2)), [ids])
    table.scale_grad_by_freq = True
    for _ in range(4):
        with pytest.raises(fm.CaptureError, match="scale_grad_by_freq"):
            probe.backward(table(ids).square().sum((1, 2)))
    table.scale_grad_by_freq = False
    steps(probe, table, lambda m, b: m(b[0]).square().sum((1, 2)), [ids])


def test_names_of_parameters_may_be_numbers():
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 4), torch.randn(6, 3)
    probe = fm.GradientProbe({0: layer.weight, 1: layer.bias}, per_parameter=True)
    found = []
    for _ in range(7):
        layer.zero_grad()
        found.append(probe.backward(_dense(layer, [x])).sq_norms)
    assert all(torch.equal(norms, found[0]) for norms in found)


def test_options_are_checked_in_every_step():
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 4), torch.randn(6, 3)
    probe = fm.GradientProbe(layer, per_parameter=True)
    steps(probe, layer, _dense, [x])
    for wrong in ({"reduction": "average"}, {"scale": 0.0}, {"batch_size": 5}):
        layer.zero_grad()
        with pytest.raises(ValueError, match="|".join(wrong)):
            probe.backward(_dense(layer, [x]), **wrong)
        steps(probe, layer, _dense, [x])


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("mode", ["observe", "fused"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: nn.Linear(3, 4), (6, 3)), (lambda: nn.Conv1d(3, 4, 2), (6, 3, 5))],
    ids=["linear", "convolution"],
)
def test_a_model_that_becomes_complex_is_refused(make, shape, mode):
    """Where a kernel of the host reads gradients, and where Python calls one."""
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    probe = fm.GradientProbe(layer, mode=mode)

    def losses(x):
        layer.zero_grad()
        return layer(x).abs().square().flatten(1).sum(1)

    for _ in range(7):
        probe.backward(losses(x))
    layer.to(torch.complex64)
    for _ in range(4):
        with pytest.raises(fm.CaptureError, match="complex"):
            probe.backward(losses(x.to(torch.complex64)))


def test_data_that_become_complex_are_refused():
    torch.manual_seed(0)
    scale, x = nn.Parameter(torch.randn(4)), torch.randn(6, 4)
    probe = fm.GradientProbe({"scale": scale})
    for step in range(9):
        scale.grad = None
        data = x if step < 7 else x.to(torch.complex64)
        losses = (scale * data).abs().square().sum(1)
        if step < 7:
            probe.backward(losses)
            continue
        with pytest.raises(fm.CaptureError, match="complex"):
            probe.backward(losses)


@pytest.mark.parametrize("steps_before", [0, 7])
def test_memory_that_was_taken_away(steps_before, not_apart):
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 4), torch.randn(6, 3)
    probe = fm.GradientProbe(layer, per_parameter=True)
    if steps_before:
        steps(probe, layer, _dense, [x], steps_before)
    data = x.clone()
    losses = _dense(layer, [data])
    data.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="no memory"):
        probe.backward(losses)
    layer.zero_grad()
    steps(probe, layer, _dense, [x])
