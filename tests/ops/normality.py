"""Whether numbers can be independent draws from the standard normal distribution."""

import math

import torch

__all__ = ["check_moments", "check_normal", "check_uncorrelated"]

# A fair draw is further away once in ten thousand: 2 exp(-2 d^2) = 1e-4 (Kolmogorov).
FARTHEST = math.sqrt(math.log(2e4) / 2)


def check_moments(x):
    """Mean, variance, skewness and kurtosis, within four standard errors."""
    for power, want, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        got = (x**power).mean().item()
        assert abs(got - want) < 4 * math.sqrt(spread / len(x)), (power, got)


def check_normal(x):
    """The distance of Kolmogorov and Smirnov."""
    below = torch.special.ndtr(x.sort().values)
    place = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)
    distance = max((place[1:] - below).max(), (below - place[:-1]).max())
    assert distance * math.sqrt(len(x)) < FARTHEST, distance


def check_uncorrelated(rows):
    """Between streams and along them, of the numbers and of their squares.

    Hundreds of products are looked at: one is 4.5 standard errors away by chance in
    150 000. They are sqrt(1 / n) between streams.
    """
    for values in (rows, (rows.square() - 1) / math.sqrt(2)):
        for offset in (0, 1, 2, 3, 4, 5, 1024):
            count = rows.shape[1] - offset
            products = values[:, offset:] @ values[:, :count].T / count
            if offset == 0:
                products.fill_diagonal_(0)
            assert products.abs().max() < 4.5 / math.sqrt(count), offset
