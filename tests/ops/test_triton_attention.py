"""Kernels of attention: against float64, by the interpreter or on a GPU."""

import pytest
import torch
from bytes_held import held
from ops.attention_cases import Case, Results, by_math, by_ops
from torch.utils._pytree import tree_map

from fastminima.ops import attention as ops
from fastminima.ops.attention import Scores
from fastminima.ops.triton import attention as kernels
from tools.kernels.capturable import capturing
from tools.kernels.interpreter import interpreting
from tools.kernels.place import Interpreter

# A term of a sum over at most 70 rows passes fewer roundings than this: its product,
# the sums of both, and those of its probability.
ROUNDINGS = 100
# In half precision probabilities, their tangents and outputs are rounded, each before
# it is multiplied or read again.
HALF_ROUNDINGS = 4


def sizes(given, scores):
    """The same sums over absolute values, and how far scores carry their rounding."""
    g, uq, uk, uv, q, k, v = (x.double().abs() for x in given)
    exact = given.to(torch.float64)
    shared = q.shape[1] // k.shape[1]
    k, v, uk, uv = (x.repeat_interleave(shared, 1) for x in (k, v, uk, uv))
    keys = exact.k.repeat_interleave(shared, 1)
    s = exact.q @ keys.mT * scores.scale
    if scores.mask is not None:
        is_seen = scores.mask.dtype == torch.bool
        s = s.masked_fill(~scores.mask, -torch.inf) if is_seen else s + scores.mask
    if scores.is_causal:
        i, j = (torch.arange(n) for n in s.shape[2:])
        s = s.masked_fill(j > i[:, None], -torch.inf)
    p = s.softmax(-1).nan_to_num()
    carried = 1 + scores.scale * float((q @ k.mT).max())
    t = scores.scale * (uq @ k.mT + q @ uk.mT)
    t = t + (p * t).sum(-1, keepdim=True)
    ds = g @ v.mT
    ds = p * (ds + (p * ds).sum(-1, keepdim=True))
    turned = p * (g @ uv.mT)
    moving = t * ds + turned + p * (t * ds + turned).sum(-1, keepdim=True)

    def summed(x):
        return x.unflatten(1, (-1, shared)).sum(2)

    parts = Results(
        p @ v, ds @ k, summed(ds.mT @ q), summed(p.mT @ g), (p * t) @ v + p @ uv,
        moving @ k + ds @ uk, summed(moving.mT @ q + ds.mT @ uq),
        summed((p * t).mT @ g),
    )  # fmt: skip
    return [x * carried for x in parts]


def check(place, case, dtype):
    given, scores = case.arguments(dtype), case.scores()

    def run(op, *args):
        return place(getattr(kernels, op.name), *args)

    if place.device == "cuda":
        scores = tree_map(
            lambda x: x.cuda() if isinstance(x, torch.Tensor) else x, scores
        )
    found = by_ops(given, scores, run)
    scores = tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, scores)
    want = by_math(given.to(torch.float64), scores)
    unit = ROUNDINGS * 2.0**-24
    if dtype == torch.bfloat16:
        unit += HALF_ROUNDINGS * 2.0**-8
    for name, got, truth, size in zip(
        Results._fields, found, want, sizes(given, scores), strict=True
    ):
        assert got.dtype == dtype and got.shape == truth.shape
        error = (got.double() - truth).abs()
        assert (error <= unit * size + 1e-30).all(), (name, error.max())


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 2, 1, 37, 37, 5, 20, True),  # widths past a tile, blocks past a row
        Case(1, 1, 1, 19, 40, 3, 3, True),  # keys that nothing sees
        Case(1, 1, 1, 40, 19, 3, 3, True),
        Case(2, 2, 1, 5, 18, 5, 6, False, "seen"),
        Case(2, 2, 2, 5, 9, 5, 6, False, "padding"),
        Case(2, 1, 1, 18, 5, 5, 6, False, "lowest"),
        Case(1, 2, 1, 5, 9, 5, 6, False, "bias"),
        Case(1, 1, 1, 1, 1, 1, 1),
    ],
    ids=str,
)
def test_float32(place, case):
    check(place, case, torch.float32)


@pytest.mark.parametrize(
    "case",
    [Case(1, 2, 1, 37, 37, 20, 5, True), Case(1, 2, 2, 7, 66, 4, 4, False, "bias")],
    ids=str,
)
def test_bfloat16(place, case):
    check(place, case, torch.bfloat16)


@pytest.mark.parametrize("sizes", [(0, 2, 3, 3), (1, 2, 0, 3), (1, 2, 3, 0)], ids=str)
def test_empty(sizes):
    batch, heads, time, steps = sizes
    case = Case(batch, heads, heads, time, steps, 4, 4)
    given, scores = case.arguments(torch.float32), case.scores()

    def run(op, *args):
        return Interpreter()(getattr(kernels, op.name), *args)

    g, *_, q, k, v = given
    for got, like in zip(by_ops(given, scores, run), 2 * (g, q, k, v), strict=True):
        assert got.shape == like.shape
        assert not got.any()


def test_wide_heads_go_to_the_reference():
    given = Case(1, 1, 1, 3, 3, 300, 4).arguments(torch.float32)
    inputs = [x.to("meta") for x in given[4:]]
    with capturing() as launches:
        kernels.attention(*inputs, Scores(1.0))
    assert not launches


def test_products_are_in_full_unless_tf32_is_asked_for(monkeypatch):
    """By the interpreter, which cuts operands as a GPU does."""
    given = Case(1, 1, 1, 16, 16, 16, 16).arguments(torch.float32)
    exact, _ = ops.attention.reference(*(x.double() for x in given[4:]), Scores(0.3))
    errors = {}
    for setting in ("highest", "high"):
        monkeypatch.setattr(
            torch, "get_float32_matmul_precision", lambda now=setting: now
        )
        with interpreting():
            out, _ = kernels.attention(*given[4:], Scores(0.3))
        errors[setting] = float((out - exact).abs().max())
    assert errors["highest"] < 1e-6 < 1e-5 < errors["high"]


def test_products_and_bytes_are_what_the_docstrings_say():
    """Of whole tiles, so that none is padded: of each kernel, in the order launched."""
    time = steps = 64
    d_in, d_out = 16, 32
    given = Case(1, 1, 1, time, steps, d_in, d_out).arguments(torch.float32)
    with interpreting() as report:
        by_ops(given, Scores(0.3), lambda op, *args: getattr(kernels, op.name)(*args))
    factors = [(1, 1), (2, 1), (2, 2), (3, 2), (5, 2), (5, 3)]
    products = [2 * time * steps * (a * d_in + b * d_out) for a, b in factors]
    assert [launch.dot_flops for launch in report.per_launch] == products
    row, wide = 4 * time * d_in, 4 * time * d_out
    number = 4 * time
    written = [
        *(wide + 2 * number, row + number, row + wide),
        *(wide + number, row + 2 * number, row + wide),
    ]
    assert [launch.store_bytes for launch in report.per_launch] == written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_hold_numbers_of_rows_alone(dtype):
    """Scores of this size would take 4 GiB a head."""
    given = Case(1, 2, 1, 4, 4, 64, 64).arguments(dtype)
    long = [x.to("meta").expand(-1, -1, 4, -1).repeat(1, 1, 8192, 1) for x in given]
    scores = Scores(0.3, is_causal=True)
    q, k, v = long[4:]
    with capturing():
        o, stats = kernels.attention(q, k, v, scores)
        moved, means = kernels.attention_tangent(*long[1:], o, stats, scores)
        arguments = *long, o, stats, moved, means, scores
        found = held(lambda: kernels.attention_gradients_tangent(*arguments))
    assert found.most == 2 * 4 * 2 * 32768  # D and D' of each row
