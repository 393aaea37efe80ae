"""Which row belongs to which sample: the traps, and that the audit sees a wrong map."""

import numpy as np
import pytest
import torch
from cases import CASES, Language
from torch import nn

import fastminima as fm
from fastminima.capture.reading import attempt, fit
from fastminima.capture.rows.layout import IrregularLayout, RegularLayout, fit_layouts
from fastminima.capture.rows.samples import Batch

BY_NAME = {case.name: case for case in CASES}


def read(case_name):
    model, batch = BY_NAME[case_name].make()
    probe = fm.GradientProbe(model)
    losses = BY_NAME[case_name].losses(model, batch)
    return probe._reader.read(losses, Batch(len(losses))).recipe


def layouts(found):
    return {
        name: of_use[0]
        for use in found.plan.uses
        for of_use in [found.layouts[use.node]]
        for name in use.parameters
    }


def test_attention_is_time_major_inside():
    found = layouts(read("mha batch first"))
    assert found["out_proj.weight"] == RegularLayout(0, 3, 4, 1)


def test_windows_have_the_batch_in_the_middle():
    assert layouts(read("windows")).popitem()[1] == RegularLayout(0, 2, 3, 2)


def test_gathered_rows_are_irregular():
    found = layouts(read("experts"))
    experts = [v for k, v in found.items() if k.startswith("experts")]
    assert experts
    assert all(isinstance(layout, IrregularLayout) for layout in experts)
    assert found["inner.weight"] == RegularLayout(0, 1, 4, 5)


def test_position_table_is_looked_up_once_for_all():
    found = read("embedding")
    use = next(u for u in found.plan.uses if "positions.weight" in u.parameters)
    assert use.name == "AddBackward0"
    assert use.slots[0].shape == (5, 6)


@pytest.mark.parametrize(
    "labels, want",
    [
        ([0, 0, 1, 1, 2, 2], [(1, 2)]),
        ([0, 1, 2, 0, 1, 2], [(2, 1)]),
        ([0, -1, -1, 1, -1, -1], [(1, 2)]),
        ([0, -1, -1, 1, 0, -1], []),
        ([0, -1, 1, -1, 2, -1], [(1, 2)]),
        ([-1, -1, -1, -1, -1, -1], [(2, 1), (1, 2)]),
        ([0, 2, 1, 0, 1, 2], []),
    ],
)
def test_fit(labels, want):
    found = fit_layouts(np.array(labels), 3)
    assert [(f.outer, f.inner) for f in found] == want


def test_regular_layout_rows():
    x = torch.arange(24).view(12, 2)
    for outer, inner in ((1, 4), (4, 1), (2, 2)):
        layout = RegularLayout(0, outer, 3, inner)
        sample = torch.arange(12) // inner % 3
        rows = layout.rows(x, 1)
        for n in range(3):
            assert torch.equal(rows[n], x[sample == n])
            kept = layout.keep_only(x, n)
            assert torch.equal(kept, x * (sample == n)[:, None])


def test_irregular_layout_rows():
    x = torch.arange(1, 11).view(5, 2)
    layout = IrregularLayout(torch.tensor([2, 0, -1, 2, 2], device="cpu"), 4)
    rows = layout.rows(x, 1)
    assert rows.shape == (4, 3, 2)
    assert torch.equal(rows[2], x[[0, 3, 4]])
    assert torch.equal(rows[0, 0], x[1])
    assert rows[1].abs().sum() == rows[3].abs().sum() == 0
    assert torch.equal(
        layout.keep_only(x, 0), x * torch.tensor([0, 1, 0, 0, 0])[:, None]
    )


@pytest.mark.parametrize("name", ["mha batch first", "linear 3d", "embedding"])
def test_a_wrong_row_map_fails_the_audit(name, monkeypatch):
    """Rows of [batch, time] read time-major and the other way round."""
    model, batch = BY_NAME[name].make()

    def swapped(*args):
        found, settled = honest(*args)
        wrong = {
            node: tuple(
                RegularLayout(x.dim, x.inner, x.batch, x.outer)
                if isinstance(x, RegularLayout) and x.outer * x.inner > 1
                else x
                for x in of_use
            )
            for node, of_use in found.items()
        }
        assert wrong != found
        return wrong, settled

    honest = fit._layouts
    assert fm.GradientProbe(model).audit(BY_NAME[name].losses(model, batch)).ok
    monkeypatch.setattr(fit, "_layouts", swapped)
    audit = fm.GradientProbe(model).audit(BY_NAME[name].losses(model, batch))
    assert not audit.ok
    wrong = [row for row in audit.rows if not row.ok]
    # The trap: each row went somewhere, so the sum of all g_n is still the gradient.
    assert all(row.sum_error < 1e-5 for row in wrong)
    assert max(row.norm_error for row in wrong) > 0.05
    assert "WRONG" in str(audit)


def test_a_sample_that_is_not_finite_leaves_the_others_alone():
    """Rows in no regular order are padded with zeros, not with zero times NaN."""
    rows = torch.tensor([[float("nan")], [1.0], [2.0], [3.0]])
    layout = IrregularLayout(torch.tensor([0, 2, 1, 2], device="cpu"), 3)
    found = layout.rows(rows, 1)
    assert found[0, 0].isnan()
    assert torch.equal(found[1:], torch.tensor([[[2.0], [0.0]], [[1.0], [3.0]]]))
    kept = layout.keep_only(rows, 2)
    assert torch.equal(kept, torch.tensor([[0.0], [1.0], [0.0], [3.0]]))


def test_a_batch_one_table_read_as_batched_fails_the_audit(monkeypatch):
    torch.manual_seed(0)
    model = Language(False)
    ids = torch.randint(0, 11, (5, 5))  # as many samples as positions
    losses = model(ids).square().mean((1, 2))
    assert fm.GradientProbe(model).audit(losses).ok

    def by_size(where, plan, *args):
        found, settled = honest(where, plan, *args)
        for use in plan.uses:
            if "positions.weight" in use.parameters:  # time taken for the batch
                found[use.node] = (RegularLayout(1, 1, 5, 1),)
        return found, settled

    honest = fit._layouts
    monkeypatch.setattr(fit, "_layouts", by_size)
    assert not fm.GradientProbe(model).audit(losses).ok


class Permuted(nn.Module):
    """Samples change places on the way, differently in each step."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.head = nn.Linear(3, 2)
        self.order = torch.arange(5)

    def forward(self, x):
        return self.head(self.layer(x)[self.order].tanh())


def test_rows_that_data_moves_are_followed():
    torch.manual_seed(0)
    model, x = Permuted(), torch.randn(5, 4)
    probe = fm.GradientProbe(model)
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 1, 2, 3, 4], [1, 2, 0, 3, 4]):
        model.order = torch.tensor(order)
        audit = probe.audit(model(x).square().sum(1), samples=5)
        assert audit.ok, f"{order}\n{audit}"


def test_dead_rows_are_settled_later():
    """A layer whose rows have no gradient at first must not be remembered wrongly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(3, 2, 4)
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    probe = fm.GradientProbe(model)
    assert probe.audit(model(x).square().sum((1, 2)), samples=3).ok
    with torch.no_grad():
        model[0].bias.fill_(0.5)
    audit = probe.audit(model(x).square().sum((1, 2)), samples=3)
    assert audit.ok, str(audit)


def test_half_precision_rows_are_found(autocast):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(6, 3, 8)
    for dtype in (torch.bfloat16, torch.float16):
        with autocast(dtype=dtype):
            losses = layer(x, x, x, need_weights=False)[0].float().square().sum((1, 2))
        audit = fm.GradientProbe(layer).audit(losses)
        assert audit.ok, str(audit)


def test_one_extra_measurement_a_structure(monkeypatch):
    count = 0
    honest = attempt.measure_samples

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return honest(*args, **kwargs)

    monkeypatch.setattr(attempt, "measure_samples", counted)
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    probe = fm.GradientProbe(model)
    for _ in range(5):
        probe.backward(model(x).square().sum(1))
    assert count == 1


def test_batch_dim_of_a_time_major_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x = torch.randn(5, 3, 4)  # [time, batch, features]

    def losses():
        return model(x).square().mean((0, 2))

    want = fm.GradientProbe(model).backward(losses()).sq_norms
    always = fm.GradientProbe(model, batch_dim=1)
    torch.testing.assert_close(
        always.backward(model(x).square().mean(), batch_size=3).sq_norms, want
    )
    once = fm.GradientProbe(model)
    loss = model(x).square().mean()
    torch.testing.assert_close(
        once.backward(loss, batch_size=3, batch_dim=1).sq_norms, want
    )
    loss = model(x).square().mean()
    once.attach(loss, batch_size=3, batch_dim=1)
    loss.backward()
    torch.testing.assert_close(once.collect().sq_norms, want)
    with pytest.raises(fm.CaptureError, match="batch_dim"):
        once.backward(model(x).square().mean(), batch_size=3)
