"""Sums over what kernels leave in parts, and squared norms of samples."""

import pytest
import torch
from ops.triton_cases import assert_within

from fastminima.ops import reduce
from fastminima.ops.triton import totals

ROUNDINGS = 24  # a term: its square, then log2 of its tile, and the tiles of a lane


@pytest.mark.parametrize("items", [1, 3, 64, 300])
@pytest.mark.parametrize("count", [1, 2, 31, 700])
def test_parts_are_added_up(place, items, count):
    parts = torch.randn(items, count)
    want = parts.double().sum(1)
    size = parts.double().abs().sum(1)
    assert_within(place(totals.last_added, parts), want, size, ROUNDINGS)
    got = place(totals.first_added, parts)
    assert_within(got, parts.double().sum(0), parts.double().abs().sum(0), ROUNDINGS)
    three = torch.randn(3, items, count)
    got = place(totals.first_added, three)
    assert got.shape == (items, count)
    assert_within(got, three.double().sum(0), three.double().abs().sum(0), ROUNDINGS)


@pytest.mark.parametrize(("items", "count"), [(1, 1), (5, 7), (130, 40)])
def test_two_kinds_of_parts_come_apart(place, items, count):
    parts = torch.randn(2, items, count)
    got = place(totals.last_added_of_two, parts)
    for each, of in zip(got, parts.double(), strict=True):
        assert_within(each, of.sum(1), of.abs().sum(1), ROUNDINGS)


def test_strided_and_empty_parts(place):
    parts = torch.randn(6, 4, 10)[:, 1]
    got = place(totals.last_added, parts)
    assert_within(got, parts.double().sum(1), parts.double().abs().sum(1), ROUNDINGS)
    assert place(totals.last_added, torch.randn(0, 3)).shape == (0,)
    assert not place(totals.last_added, torch.randn(3, 0)).any()


@pytest.mark.parametrize("width", [1, 5, 64, 2048, 5000, 40_000])
@pytest.mark.parametrize("batch", [1, 7])
def test_squared_norms_of_samples(place, batch, width):
    x = (
        torch.randn(batch, 2 * width)[:, ::2]
        if width < 100
        else torch.randn(batch, width)
    )
    want = reduce.sample_sq_norms.reference(x.double())
    assert_within(place(totals.sample_sq_norms, x), want, want, ROUNDINGS)


def test_no_samples_and_no_width(place):
    assert place(totals.sample_sq_norms, torch.randn(0, 3)).shape == (0,)
    assert not place(totals.sample_sq_norms, torch.randn(3, 0)).any()
