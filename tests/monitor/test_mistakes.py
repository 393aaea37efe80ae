"""What goes wrong in loops that are watched: said at once, or lived through."""

import json
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastminima as fm

SHARPNESS = "sharpness/eigenvalue_1"


def setup():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def batch(size=8):
    return torch.randn(size, 6), torch.randint(3, (size,))


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def mean_loss(model, batch):
    return losses(model, batch).mean()


@pytest.mark.parametrize("loss", [mean_loss, None])
def test_a_step_that_is_not_finite_has_no_sharpness(loss, tmp_path):
    """Training goes on, and the row and its spike are written."""
    model, optimizer = setup()
    w = fm.monitor.watch(model, optimizer, loss=loss, to=tmp_path / "a", sharpness=1)
    found = []
    for step in range(3):
        x, y = batch()
        if step == 1:
            x[2, 3] = torch.nan
        optimizer.zero_grad()
        found.append(w.backward(losses(model, (x, y)), batch=(x, y)))
        is_whole = all(p.grad.isfinite().all() for p in model.parameters())
        assert is_whole == (step != 1)
        if is_whole:
            optimizer.step()
    w.close()
    assert [SHARPNESS in row for row in found] == [True, False, True]
    assert [row["is_finite"] for row in found] == [True, False, True]
    spikes = (tmp_path / "a" / "spikes.jsonl").read_text().splitlines()
    assert json.loads(spikes[0])["step"] == 1


@pytest.mark.parametrize("loss", [lambda m, x: m(x).abs().sqrt().mean(), None])
def test_a_product_that_is_not_finite_neither(loss):
    """The loss is finite, and its derivatives are not."""
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    w = fm.monitor.watch(model, loss=loss, sharpness=1)
    x = torch.randn(5, 3)
    row = w.backward(model(x).abs().sqrt().squeeze(1), batch=x)
    assert SHARPNESS not in row
    assert not row["is_finite"]
    assert model.weight.grad is not None


def test_what_is_not_finite_is_an_error_of_its_own():
    model, _ = setup()
    bad = torch.full((4, 6), torch.nan), torch.zeros(4, dtype=torch.long)
    with pytest.raises(fm.curvature.NotFiniteError, match="non-finite loss"):
        fm.SharpnessProbe(model, mean_loss)(bad)
    assert issubclass(fm.curvature.NotFiniteError, ValueError)


def sharpness_of(loss):
    """The sharpness of one step, and what is said of the loss."""
    model, optimizer = setup()
    w = fm.monitor.watch(model, optimizer, loss=loss, sharpness=1)
    data = batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            row = w.backward(losses(model, data), batch=data)
    return row[SHARPNESS], [str(one.message) for one in caught]


def test_a_loss_that_adds_up_is_told():
    right, nothing = sharpness_of(mean_loss)
    assert nothing == []
    wrong, (said,) = sharpness_of(lambda model, data: losses(model, data).sum())
    assert wrong == pytest.approx(8 * right, rel=0.05)
    assert "8 times as much, the number of samples" in said


def test_another_loss_is_told():
    _, (said,) = sharpness_of(lambda model, data: 0.1 * mean_loss(model, data))
    assert "not that of what is trained" in said


def test_dropout_is_no_other_loss():
    def dropped(model, data):
        return mean_loss(model, (F.dropout(data[0], 0.5), data[1]))

    assert sharpness_of(dropped)[1] == []


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ("runs/a", "Where rows go is to='runs/a'"),
        (nn.CrossEntropyLoss(), "takes outputs and targets"),
        (torch.zeros(()), "must be a function"),
    ],
)
def test_what_is_no_closure_is_refused_at_once(loss, said):
    model, optimizer = setup()
    with pytest.raises(TypeError, match=said):
        fm.monitor.watch(model, optimizer, loss)


@pytest.mark.parametrize(
    "bad",
    [
        *({"largest": -1}, {"largest": 2.5}, {"dataset_size": 0}, {"eigenvalues": 0}),
        *({"max_norm": 0.0}, {"max_norm": "1.0"}),
    ],
)
def test_options_are_refused_before_the_first_step(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name} must be"):
        fm.monitor.watch(*setup(), **bad)


@pytest.mark.parametrize("name", ["step", "loss", "gradient/count"])
def test_extra_columns_replace_none(name):
    model, optimizer = setup()
    w = fm.monitor.watch(model, optimizer)
    with pytest.raises(ValueError, match=f"'{name}'.* has the name of a column"):
        w.backward(losses(model, batch()), extra={name: 1.0})


def test_a_pattern_that_is_found_nowhere_is_told():
    model, optimizer = setup()
    w = fm.monitor.watch(model, optimizer, layers="attn")
    with pytest.warns(UserWarning, match="'attn' is found in no layer.*'0', '2'"):
        row = w.backward(losses(model, batch()))
    assert not any(name.startswith("layers/") for name in row)


def test_steps_that_are_no_multiples_of_gradients_have_no_ratio():
    model, _ = setup()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    w = fm.monitor.watch(model, optimizer, sharpness=1)
    with pytest.warns(UserWarning, match="LBFGS multiplies gradients by a matrix"):
        row = w.backward(losses(model, batch()))
    assert row["factors/learning_rate"] == 0.1
    assert not {"factors/ratio", "sharpness/two_over_lr"} & row.keys()


def test_an_optimizer_that_nobody_knows_is_named():
    class Mine(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 0.1})

    class MySGD(torch.optim.SGD):
        pass

    model, _ = setup()
    w = fm.monitor.watch(model, Mine(model.parameters()))
    with pytest.warns(UserWarning, match="Mine is taken for SGD"):
        assert w.backward(losses(model, batch()))["factors/ratio"] == 0.1 / 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, and of SGD never
        w.backward(losses(model, batch()))
        fm.monitor.watch(model, MySGD(model.parameters())).backward(
            losses(model, batch())
        )


def test_an_optimizer_of_another_model():
    (model, _), (_, other) = setup(), setup()
    with pytest.warns(UserWarning, match="SGD has no parameter of this Sequential"):
        fm.monitor.watch(model, other)


def test_clipping_of_what_is_not_finite_has_no_factor():
    model, optimizer = setup()
    w = fm.monitor.watch(model, optimizer, max_norm=1.0)
    x, y = batch()
    assert 0 < w.backward(losses(model, (x, y)))["factors/clip"] <= 1
    row = w.backward(losses(model, (x * torch.nan, y)))
    assert not row["is_finite"]
    assert not {"factors/clip", "factors/ratio", "factors/temperature"} & row.keys()


def test_inner_products_of_samples_of_different_passes():
    model, optimizer = setup()
    with pytest.raises(ValueError, match="does not go with accumulate"):
        fm.monitor.watch(model, optimizer, accumulate=2, measure=("norms", "gram"))


def test_names_and_kinds_of_what_is_given():
    model, optimizer = setup()
    with pytest.raises(TypeError, match=r"no option 'evry'\. Did you mean 'every'"):
        fm.monitor.watch(model, optimizer, evry=3)
    with pytest.raises(TypeError, match=r"must be a tensor, got 0\.5"):
        fm.monitor.watch(model, optimizer).backward(0.5)
