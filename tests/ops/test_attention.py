"""Attention, its gradients and their tangents: against autograd on the plain form."""

import pytest
import torch
from bytes_held import bytes_of, held
from ops.attention_cases import Case, by_math, by_ops

from fastminima.ops import _pieces
from fastminima.ops.attention import Scores, attention

CASES = [
    Case(2, 4, 4, 7, 7, 5, 3),
    Case(1, 1, 1, 1, 1, 1, 1),
    Case(2, 4, 2, 7, 7, 5, 3, True),
    Case(2, 2, 2, 70, 70, 5, 3, True),
    Case(1, 2, 2, 7, 11, 5, 3, True),
    Case(1, 2, 2, 11, 7, 5, 3, True),
    Case(2, 4, 1, 7, 9, 5, 6, False, "seen"),
    Case(2, 4, 2, 7, 9, 5, 6, False, "padding"),
    Case(2, 4, 2, 7, 9, 5, 6, False, "lowest"),
    Case(2, 4, 2, 7, 9, 5, 6, False, "bias"),
]


@pytest.mark.parametrize("limit", [_pieces.LIMIT, 20_000])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_plain_form(monkeypatch, case, limit):
    monkeypatch.setattr(_pieces, "LIMIT", limit)
    given, scores = case.arguments(torch.float64), case.scores()
    for got, want in zip(by_ops(given, scores), by_math(given, scores), strict=True):
        torch.testing.assert_close(got, want)


def test_rows_that_see_nothing_are_zero():
    case = Case(1, 2, 2, 5, 6, 3, 4, False, "seen")
    found = by_ops(case.arguments(torch.float32), case.scores())
    for x in (found.o, found.dq, found.moved, found.turned_q):
        assert not x[:, :, 2].any()
        assert x[:, :, 1].any()


def test_what_is_not_a_number_stays_so():
    given = Case(1, 1, 1, 4, 4, 3, 3).arguments(torch.float32)
    given.q[0, 0, 1, 0] = torch.nan
    out, _ = attention(*given[4:], Scores(1.0))
    assert out[0, 0, 1].isnan().all()
    assert out[0, 0, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_float32(dtype):
    case = Case(2, 4, 2, 17, 19, 5, 6, False, "bias")
    given, scores = case.arguments(dtype), case.scores()
    # Outputs are rounded before they are read again.
    rtol = 4 * torch.finfo(dtype).eps
    found = by_ops(given, scores)
    for got, want in zip(found, by_math(given.to(torch.float64), scores), strict=True):
        assert got.dtype == dtype
        atol = rtol * float(want.abs().max())
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)


def test_strided_inputs():
    case = Case(2, 4, 4, 7, 7, 5, 5, True)
    given, scores = case.arguments(torch.float64), case.scores()
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    found = by_ops(type(given)(*apart), scores)
    for got, want in zip(found, by_ops(given, scores), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("is_causal", [False, True])
def test_memory_does_not_grow_with_the_square(monkeypatch, is_causal):
    """Scores of one head are 256 KiB, the limit; the arguments a ninth of it."""
    monkeypatch.setattr(_pieces, "LIMIT", 1 << 18)
    case = Case(1, 1, 1, 256, 256, 4, 4, is_causal)
    given, scores = case.arguments(torch.float32), case.scores()
    found = held(lambda: by_ops(given, scores))  # with what one op gives the next
    assert bytes_of(given) == 7 << 12
    assert found.most < 1 << 18, found
