"""The default mode is bitwise neutral, and attach/collect is the same as backward."""

import copy

import pytest
import torch

import fastminima as fm
from benchmarks.workloads import build, sample_losses


def train(model, batches, lr, probe=None):
    """Losses and final parameters of plain SGD, probed or not."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        each = sample_losses(model(x), y)
        if probe is None:
            each.mean().backward()
        else:
            probe.backward(each)
        losses.append(each.detach().clone())
        optimizer.step()
    grads = [p.grad.clone() for p in model.parameters()]
    return losses, grads, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("name", "steps"),
    [("W1", 20), ("W2", 20), pytest.param("W5", 4, marks=pytest.mark.slow)],
)
def test_steps_are_bitwise_equal(name, steps):
    workload = build(name)
    generator = torch.Generator().manual_seed(1)
    orders = [
        torch.randperm(workload.batch_size, generator=generator) for _ in range(steps)
    ]
    batches = [(workload.inputs[o], workload.targets[o]) for o in orders]
    probed_model = copy.deepcopy(workload.model)
    probe = fm.GradientProbe(
        probed_model, measure=("norms",), per_parameter=True, keep_mean=True
    )
    state = torch.get_rng_state()
    plain = train(workload.model, batches, 0.01)
    assert torch.equal(torch.get_rng_state(), state)
    probed = train(probed_model, batches, 0.01, probe)
    assert torch.equal(torch.get_rng_state(), state), "the probe drew random numbers"
    for a, b in zip(plain, probed, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def setup():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
    )
    return model, torch.randn(8, 6), torch.randint(0, 3, (8,))


def loss_of(model, x, y, reduction="none"):
    return torch.nn.functional.cross_entropy(model(x), y, reduction=reduction)


def test_attach_and_collect():
    model, x, y = setup()
    probe = fm.GradientProbe(model)
    want = probe.backward(loss_of(model, x, y))
    for loss, options in (
        (loss_of(model, x, y, "mean"), {}),
        (loss_of(model, x, y, "sum"), {"reduction": "sum"}),
    ):
        model.zero_grad()
        probe.attach(loss, batch_size=len(x), **options)
        loss.backward()
        got = probe.collect()
        torch.testing.assert_close(got.sq_norms, want.sq_norms)
        torch.testing.assert_close(got.mean_grad_sq_norm, want.mean_grad_sq_norm)


def test_where_no_graph_is_made():
    model, x, y = setup()
    probe = fm.GradientProbe(model)
    loss = loss_of(model, x, y, "mean")
    with torch.no_grad():
        stats = probe.backward(loss, batch_size=len(x))
    want = probe.backward(loss_of(model, x, y))
    torch.testing.assert_close(stats.sq_norms, want.sq_norms)


def test_gradients_that_were_there_are_left_out():
    model, x, y = setup()
    probe = fm.GradientProbe(model, keep_mean=True)
    want = probe.backward(loss_of(model, x, y))
    again = probe.backward(loss_of(model, x, y))  # .grad holds the first
    torch.testing.assert_close(again.mean_grad_sq_norm, want.mean_grad_sq_norm)
    torch.testing.assert_close(model[0].weight.grad, 2 * want.mean_grad["0.weight"])


def test_gradient_scaler(device):
    model, x, y = setup()
    probe = fm.GradientProbe(model, keep_mean=True)
    want = probe.backward(loss_of(model, x, y))
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    loss = loss_of(model, x, y, "mean")
    probe.attach(loss, len(x))  # the scale is seen in the gradient that arrives
    scaler.scale(loss).backward()
    got = probe.collect()
    torch.testing.assert_close(got.sq_norms, want.sq_norms)
    torch.testing.assert_close(got.mean_grad_sq_norm, want.mean_grad_sq_norm)
    probe.attach(loss_again := loss_of(model, x, y, "mean"), len(x), scale=1024.0)
    with pytest.warns(UserWarning, match="taken out once"):
        scaler.scale(loss_again).backward()
    torch.testing.assert_close(probe.collect().sq_norms, want.sq_norms)
    model.zero_grad()
    got = probe.backward(scaler.scale(loss_of(model, x, y)), scale=1024.0)
    torch.testing.assert_close(got.sq_norms, want.sq_norms)
    torch.testing.assert_close(model[0].weight.grad / 1024, want.mean_grad["0.weight"])


def test_two_probes_at_once():
    model, x, y = setup()
    a = fm.GradientProbe(model)
    b = fm.GradientProbe({"w": model[0].weight}, measure="gram")
    want = fm.GradientProbe(model).backward(loss_of(model, x, y))
    loss = loss_of(model, x, y, "mean")
    a.attach(loss, len(x))
    b.attach(loss, len(x))
    loss.backward()
    torch.testing.assert_close(a.collect().sq_norms, want.sq_norms)
    stats = b.collect()
    torch.testing.assert_close(stats.gram.diagonal(), stats.sq_norms)


@pytest.mark.parametrize("sizes", [(8, 8, 3, 8, 1, 3, 8, 5)])
def test_batches_of_changing_size(sizes):
    model, x, y = setup()
    probe = fm.GradientProbe(model)
    whole = probe.backward(loss_of(model, x, y)).sq_norms
    for size in sizes:
        got = probe.backward(loss_of(model, x[:size], y[:size])).sq_norms
        torch.testing.assert_close(got, whole[:size])


def test_sequences_of_changing_length():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    probe = fm.GradientProbe(layer)
    for time in (5, 7, 3, 9, 4, 6):
        x = torch.randn(3, time, 8)
        audit = probe.audit(layer(x).square().sum((1, 2)))
        assert audit.ok, str(audit)
