"""The floor model counts what is there, and the package prefers what it says."""

import importlib.util
import json

import pytest
import torch

from fastminima.ops._pieces import dense_parts
from fastminima.ops.preferences import ON_GPU, is_preferred
from tools.kernels import floors
from tools.kernels.cases import ARGUMENTS, Tensors, all_ops, cases
from tools.kernels.measured import RECORD, measured_preferences
from tools.kernels.tally import tally
from tools.kernels.work import FLOORS, Work, work_of


def test_every_op_has_a_floor_and_arguments():
    assert set(all_ops()) <= set(FLOORS)
    assert set(ARGUMENTS) == set(FLOORS)


def _bytes_of(*shapes, each):
    return sum(torch.Size(shape).numel() for shape in shapes) * each


def test_least_work_of_a_dense_layer():
    """Counted by hand: products as pairs of loops, bytes by tensor."""
    batch, time, d_in, d_out = 3, 5, 7, 11
    new = Tensors("meta", torch.bfloat16)
    a, g = new.normal(batch, time, d_in), new.normal(batch, time, d_out)
    moved = _bytes_of(a.shape, g.shape, each=2)
    pairs = sum(1 for t in range(time) for s in range(t + 1))
    gram = batch * pairs * 2 * (d_in + d_out)
    direct = batch * time * 2 * d_in * d_out
    assert work_of("gram_sq_norms", (a, g)) == Work(moved + 4 * batch, gram)
    assert work_of("direct_sq_norms", (a, g)) == Work(moved + 4 * batch, direct)
    least = work_of("sequence_sq_norms", (a, g, True))
    assert least == Work(moved + 8 * batch, min(gram, direct))


def test_least_work_of_a_convolution_is_that_of_its_weight_gradient():
    from torch.utils.flop_counter import FlopCounterMode

    sizes = ARGUMENTS["conv_sq_norms"]
    x, g, geometry, _ = sizes["64x3@32->64 k3"](Tensors("meta", torch.float32))
    with FlopCounterMode(display=False) as counter:
        torch.ops.aten.convolution_backward(
            g,
            x,
            x.new_empty(geometry.weight_shape(x, g)),
            None,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            False,
            [0, 0],
            geometry.groups,
            [False, True, False],
        )
    work = work_of("conv_fused", (x, g, geometry, False, False))
    assert work.products == counter.get_total_flops()


def test_tally_counts_passes_over_memory():
    """Reads x, writes the square; reads that, writes the sum: views cost nothing."""
    x = torch.empty(4, 6, device="meta")
    found = tally(lambda x: x.t().square().sum(), (x,))
    assert found.steps == [Work(2 * 24 * 4), Work(25 * 4)]
    assert not found.launches


def test_tally_counts_products_and_broadcasts_once():
    x, y = torch.empty(2, 3, 5, device="meta"), torch.empty(2, 5, 7, device="meta")
    (step,) = tally(torch.bmm, (x, y)).steps
    assert step == Work((30 + 70 + 42) * 4, 2 * 2 * 3 * 5 * 7)
    (step,) = tally(torch.add, (x, x.new_empty(3, 1).expand(2, 3, 5))).steps
    assert step.bytes == (30 + 3 + 30) * 4


def test_the_plain_way_is_never_below_the_floor():
    """But for the reference of a Gram norm, which may move less than all of it."""
    for bound in floors.bounds(backend="triton"):
        assert bound.plain is None or bound.plain > 0.99 * bound.floor, bound.case
        assert bound.kernel is None or bound.kernel > 0.99 * bound.floor, bound.case


def test_bound_by_hand(monkeypatch):
    """One float32 sum of 10 M elements: 40 MB at 3 TB/s and one launch.

    The plain way squares and sums pieces, then sums their sums.
    """
    chosen = [c for c in cases("reference") if c.op.name == "sq_norm"]
    monkeypatch.setattr(floors, "cases", lambda backend: chosen)
    found = {b.case: b for b in floors.bounds(backend="reference")}
    bound = found["sq_norm 3200x3125 float32"]
    assert bound.floor == pytest.approx(3e-6 + 40e6 / 3e12)
    pieces = list(dense_parts(torch.empty(3200, 3125, device="meta"), bytes_each=8))
    launches = 2 * len(pieces) + 2
    assert bound.plain == pytest.approx(launches * 3e-6 + 3 * 40e6 / 3e12, rel=1e-3)
    assert bound.limit == "memory"


def test_a_kernel_must_be_faster_at_every_size():
    def bound(op, kernel, plain):
        return floors.Bound("", op, torch.float32, 1, 0, 1.0, kernel, plain, "memory")

    told = floors.prefer(
        [
            bound("good", 1.0, 4.0),
            bound("good", 1.0, 1.6),
            bound("mixed", 1.0, 9.0),
            bound("mixed", 1.0, 1.4),
            bound("unknown", 1.0, None),
        ]
    )
    good, mixed = ("good", torch.float32), ("mixed", torch.float32)
    assert set(told) == {good, mixed}
    assert told[good].backend == "triton" and told[good].speedup == 1.6
    assert told[mixed].backend == "reference"


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
def test_preferences_are_what_was_measured():
    """`python -m tools.kernels.floors --preferences` prints the lines to put there."""
    told = floors.decide()
    assert told.keys() == ON_GPU.keys()
    for key, preference in told.items():
        assert ON_GPU[key].backend == preference.backend, key
        assert ON_GPU[key].source == preference.source, key
        assert ON_GPU[key].speedup == pytest.approx(preference.speedup, rel=0.2), key


def record(tmp_path, cases):
    """A record of least times; the medians are those of a host that is in the way."""
    timed = {
        label: {
            name: {"least_us": t, "median_us": 1000 / t} for name, t in times.items()
        }
        for label, times in cases.items()
    }
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"cases": timed}))
    return path


def test_a_kernel_is_preferred_where_it_was_measured_faster(tmp_path):
    told = measured_preferences(
        record(
            tmp_path,
            {
                "good 2x3 float32": {"triton": 10, "reference": 30},
                "slow 2x3 float32": {"triton": 30, "reference": 20},
                "other_way 2x3 float32": {"triton": 30, "torch": 20, "reference": 40},
                "mixed 2x3 bfloat16": {"triton": 10, "reference": 90},
                "mixed 2x4 bfloat16": {"triton": 50, "reference": 20},
                "even 2x3 bfloat16": {"cuda": 10, "reference": 90},
                "even 2x4 bfloat16": {"cuda": 21, "reference": 20},
                "embedding_x 2x3 of 5x4 bfloat16": {"cuda": 10, "reference": 20},
                "alone 2x3 float32": {"reference": 20},
            },
        )
    )
    assert {op: p.backend for (op, _), p in told.items()} == {
        "good": "triton",
        "slow": "reference",
        "other_way": "reference",
        "mixed": "reference",
        "even": "cuda",
        "embedding_x": "cuda",
    }
    assert told["good", torch.float32].speedup == pytest.approx(3)
    assert told["embedding_x", torch.int64].speedup == pytest.approx(2)


@pytest.mark.parametrize(
    ("op", "dtype"),
    [("sequence_fused", torch.float32), ("gram_sq_norms", torch.float32)],
)
def test_what_was_measured_slower_is_not_preferred(op, dtype):
    assert not is_preferred(op, "triton", dtype)


def test_what_is_not_decided_is_an_error():
    """It went PyTorch's way, at 600 launches a step for gradients in bfloat16."""
    assert is_preferred("multi_sq_norm", "cuda", torch.bfloat16)
    with pytest.raises(LookupError, match="No preference for sq_norms_of_what"):
        is_preferred("sq_norms_of_what", "triton", torch.float32)


def test_no_way_is_used_that_the_record_shows_slower():
    """Of kernels and of PyTorch's ways alike, over all sizes that were timed."""
    ops, timed = all_ops(), json.loads(RECORD.read_text())["cases"]
    sizes = {}
    for label, row in timed.items():
        name, *_, dtype = label.split()
        if name in ops and "cuda" not in row:  # those are not in every build
            sizes.setdefault((name, getattr(torch, dtype)), []).append(row)
    assert len(sizes) > 30
    for (name, dtype), rows in sizes.items():
        used = ops[name].backends("cuda", dtype)[0]
        for other in {*rows[0]} & {"triton", "torch", "reference"}:
            ours, theirs = (
                sum(row[way]["least_us"] for row in rows) for way in (used, other)
            )
            assert ours <= theirs, (name, dtype, used, other)


def test_ops_prefer_what_the_preferences_say():
    for case in cases("triton"):
        for implementation in case.op:
            backend = implementation.backend
            if backend in ("triton", "cuda") and case.key in implementation.dtypes:
                said = is_preferred(case.op.name, backend, case.key)
                assert implementation.is_preferred == said, case.label
