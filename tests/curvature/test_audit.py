"""Audits of operators: what is wrong is found, what is right is not called wrong."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastminima as fm

from .cases import CASES, loss, losses, make, output_loss, outputs
from .faults import FAULTS, Hooked, net, sample


def operators(model, batch):
    yield fm.Hessian(model, loss, batch)
    yield fm.GaussNewton(model, outputs, output_loss, batch)
    yield fm.GradientCovariance(model, losses, batch)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nothing_is_wrong_with_what_is_right(name, dtype, device):
    model, batch = make(name, dtype, device=device)
    for operator in operators(model, batch):
        audit = operator.audit()
        assert audit.ok, f"{audit}"
        told = [c for c in audit.checks if c.name == "differences"]
        assert any(c.verdict == "ok" for c in told), f"{audit}"


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found_and_named(name, device):
    fault = FAULTS[name]
    torch.manual_seed(0)
    model = fault.make().to(device)
    audit = fm.Hessian(model, fault.loss, sample(device)).audit()
    line = audit[fault.line]
    assert not audit.ok
    assert line.verdict == "WRONG", f"{audit}"
    assert re.search(fault.says, f"{line.met} {line.remedy}"), f"{audit}"
    assert len(line.remedy) > 20


@pytest.mark.parametrize("name", ["detached backward", "once differentiable"])
def test_products_are_refused_where_values_are_detached(name, device):
    fault = FAULTS[name]
    H = fm.Hessian(fault.make().to(device), loss, sample(device))
    with pytest.raises(ValueError, match=fault.says):
        H @ torch.ones(H.shape[0], device=device)


@pytest.mark.parametrize("cls", [fm.GaussNewton, fm.GradientCovariance])
def test_a_backward_that_is_none_is_found_in_every_operator(cls, device):
    torch.manual_seed(0)
    model, batch = net(Hooked()).to(device), sample(device)
    closures = {fm.GaussNewton: (outputs, output_loss)}.get(cls, (losses,))
    audit = cls(model, *closures, batch).audit()
    assert not audit["differences"].ok, f"{audit}"


def test_the_fault_is_placed(device):
    torch.manual_seed(0)
    model = net(nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))).to(device)
    line = fm.Hessian(model, loss, sample(device)).audit()["differences"]
    assert "1.parametrizations.weight.original" in line.met
    assert "_u" in line.remedy  # the buffer that follows the weight
    audit = fm.Hessian(model.eval(), loss, sample(device)).audit()
    assert audit["buffers"].verdict == "ok"


def test_rescaled_rows_are_given_as_the_reason(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, max_norm=1.0), nn.Linear(4, 3))
    batch = sample(device)[1], sample(device)[1]
    line = fm.Hessian(model.to(device), loss, batch).audit()["gradient"]
    assert "max_norm rescales rows" in line.remedy


def test_rows_of_zeros_are_said(device):
    torch.manual_seed(0)
    model = net(nn.Tanh())
    model.idle, model.first = nn.Linear(2, 2), nn.Parameter(torch.zeros(3))
    model = model.to(device)

    def of_body(model, batch):
        x = batch[0]
        for layer in list(model)[:3]:
            x = layer(x)
        return F.cross_entropy(x, batch[1]) + model.first.sum()

    audit = fm.Hessian(model, of_body, sample(device)).audit()
    assert audit.ok
    assert "not reached: idle.weight, idle.bias" in audit["reach"].met
    assert "first order only: first" in audit["reach"].met


def test_what_is_good_to_know_is_noted(device):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 3))
    x, y = sample(device)

    def of_half(model, batch):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            z = model(batch[0][:, None])
        return F.cross_entropy(z.float(), batch[1])

    audit = fm.Hessian(model.to(device), of_half, (x, y)).audit()
    assert audit.ok, f"{audit}"
    noted = {c.name: c.met for c in audit.checks if c.verdict == "note"}
    expected = {"random numbers", "buffers", "precision", "rewritten", "batch norm"}
    assert expected <= set(noted)
    assert "running_mean" in noted["buffers"]
    assert "attention" in noted["rewritten"]


def test_a_kink_at_the_point_is_no_fault(device):
    torch.manual_seed(0)
    model = net(nn.ReLU()).double().to(device)
    with torch.no_grad():
        model[0].bias.zero_()
    x, y = sample(device)
    audit = fm.Hessian(model, loss, (torch.zeros_like(x).double(), y)).audit()
    assert audit.ok
    assert audit["differences"].verdict == "untold"
    assert "kinks" in audit["differences"].met


def test_a_wide_network_of_kinks_is_not_called_wrong(device):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU()),
        nn.Linear(300, 3),
    ).to(device)

    def float32_alone(model, batch):
        x, weight = batch[0].float(), torch.ones(3, device=device)
        return F.cross_entropy(model(x), batch[1], weight=weight.float())

    for closure in (loss, float32_alone):
        audit = fm.Hessian(model, closure, sample(device)).audit()
        assert audit.ok, f"{audit}"


def test_the_matrix_of_a_linear_loss_is_zero_and_right(device):
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double().to(device)
    x = sample(device)[0].double()
    audit = fm.Hessian(model, lambda model, x: model(x).mean(), x).audit()
    assert audit.ok
    assert audit["differences"].verdict == "ok"


def test_several_batches(device):
    torch.manual_seed(0)
    model = net(nn.Tanh()).to(device)
    data = torch.utils.data.TensorDataset(*sample("cpu"))
    loader = torch.utils.data.DataLoader(data, 5, shuffle=True)

    def moved(model, batch):
        return loss(model, tuple(part.to(device) for part in batch))

    assert fm.Hessian(model, moved, loader).audit().ok

    def summed(model, batch):
        return moved(model, batch) * len(batch[0])

    line = fm.Hessian(model, summed, loader).audit()["weights"]
    assert line.verdict == "WRONG"
    assert "count=" in line.remedy


def test_several_ranks_are_refused(device):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, batch = net(nn.Tanh()).to(device), sample(device)
        H = fm.Hessian(model, loss, batch, process_group="world")
        of_step = fm.LossHessian(model, loss(model, batch), process_group="world")
        for operator in (H, of_step, H + H):
            with pytest.raises(ValueError, match=r"one process.*ddp\.module"):
                operator.audit()
    finally:
        torch.distributed.destroy_process_group()


def test_nothing_is_changed(device):
    torch.manual_seed(0)
    layers = (nn.Tanh(), nn.Dropout(0.2), nn.BatchNorm1d(16))
    model, batch = net(*layers).to(device), sample(device)
    loss(model, batch).backward()
    H = fm.Hessian(model, loss, batch)
    v = torch.ones(H.shape[0], device=device)
    product, kept = H @ v, H._kept
    before = copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in model.parameters()]
    state, products = torch.get_rng_state(), H.extra_products
    assert H.audit().ok
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad)
    assert torch.equal(torch.get_rng_state(), state)
    assert (H._kept, H.extra_products, model.training) == (kept, products, True)
    assert torch.equal(H @ v, product)


def test_it_prints_as_a_table_and_is_found_by_name(device):
    model, batch = make("mlp", device=device)
    audit = fm.Hessian(model, loss, batch).audit(seed=3)
    text = str(audit)
    assert text.startswith("Hessian 38 x 38\n")
    assert text.endswith("nothing wrong")
    for check in audit.checks:
        assert re.search(rf"^{check.name} .* {check.verdict} ", text, re.MULTILINE)
    with pytest.raises(KeyError, match=r"No line 'colour'.*symmetry"):
        audit["colour"]
    with pytest.raises(AttributeError):
        audit.operator = "other"


def test_of_what_is_made_of_operators(device):
    """Each below has its lines, and its name in them."""
    model, batch = make("mlp", device=device)
    hessian, gauss_newton, _ = operators(model, batch)
    made = (hessian - 0.5 * gauss_newton).block("2")
    audit = made.audit()
    assert audit.ok, f"{audit}"
    for name in ("1, Hessian: ", "2, GaussNewton: "):
        mine = [c for c in audit.checks if c.looked_at.startswith(name)]
        assert {"symmetry", "differences", "precision"} <= {c.name for c in mine}
    assert audit["within"].error <= 1e-8
    assert "Block(18 x 18)" in f"{audit}"


def test_a_wrong_one_among_several(device):
    torch.manual_seed(0)
    model, batch = net(Hooked()).to(device), sample(device)
    _, gauss_newton, _ = operators(model, batch)
    audit = (fm.LossHessian(model, loss(model, batch)) + gauss_newton).audit()
    assert not audit.ok
    line = audit["differences"]
    assert line.verdict == "WRONG"
    assert line.looked_at.startswith("2, GaussNewton: ")


def test_a_product_within_that_is_off(monkeypatch):
    model, batch = make("mlp")
    H = fm.Hessian(model, loss, batch)
    block = H.block("0")
    monkeypatch.setattr(
        type(H), "_within", lambda self, v, only: 1.01 * (self @ v), raising=True
    )
    audit = block.audit()
    assert audit["within"].verdict == "WRONG"
    assert audit["symmetry"].ok


def test_of_the_graph_of_a_step(device):
    model, batch = make("conv", device=device)
    H = fm.LossHessian(model, losses(model, batch))
    before = H @ torch.ones(H.shape[0], device=device).double()
    audit = H.audit()
    assert audit.ok, f"{audit}"
    assert audit["differences"].verdict == "untold"
    assert audit["symmetry"].error <= 1e-10
    torch.testing.assert_close(H @ torch.ones_like(before), before)
    assert all(p.grad is None for p in model.parameters())
    assert (2 * H).audit()["symmetry"].looked_at.startswith("LossHessian: ")


def test_a_fault_in_the_graph_of_a_step(device):
    for name, line in (("clipping hook", "symmetry"), ("root of zero", "products")):
        fault = FAULTS[name]
        torch.manual_seed(0)
        model = fault.make().to(device)
        audit = fm.LossHessian(model, fault.loss(model, sample(device))).audit()
        assert audit[line].verdict == "WRONG", f"{audit}"
        assert len(audit[line].remedy) > 20
