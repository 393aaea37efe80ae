"""Three outcomes, each from numbers that ask for it."""

import math

import numpy as np
import pytest

from examples.engine.outcome import (
    HELD,
    NOT_HELD,
    UNDECIDED,
    Claim,
    decide,
    mean_and_spread,
)

TIGHT = [0.9, 1.0, 1.1, 1.0, 0.95]


def outcome(*claims, found=10, expected=10):
    return decide(claims, found=found, expected=expected).outcome


@pytest.mark.parametrize(
    ("values", "low", "high", "want"),
    [
        (TIGHT, 0, math.inf, HELD),
        (TIGHT, 2, math.inf, NOT_HELD),
        (TIGHT, 1, math.inf, UNDECIDED),
        (TIGHT, -math.inf, 2, HELD),
        (TIGHT, -math.inf, 0, NOT_HELD),
        (TIGHT, 0.5, 1.5, HELD),
        (TIGHT, 1.5, 2.0, NOT_HELD),
        (TIGHT, 0.98, 1.02, UNDECIDED),
        ([-3, 5, 1, -2, 4], 0, math.inf, UNDECIDED),
        ([1.0, 1.0], 0, math.inf, UNDECIDED),
        ([], 0, math.inf, UNDECIDED),
        ([1.0, 1.0, math.nan, 1.0], 0, math.inf, UNDECIDED),
    ],
)
def test_of_one_claim(values, low, high, want):
    assert outcome(Claim("it", values, low, high)) == want


def test_one_claim_on_the_other_side_decides_and_one_unclear_leaves_open():
    held, against = Claim("a", TIGHT, low=0), Claim("b", TIGHT, low=2)
    unclear = Claim("c", [-3, 5, 1, -2, 4], low=0)
    assert outcome(held, held) == HELD
    assert outcome(held, unclear) == UNDECIDED
    assert outcome(held, unclear, against) == NOT_HELD


def test_too_few_runs_decide_nothing():
    claim = Claim("it", TIGHT, low=0)
    assert outcome(claim, found=9) == HELD
    assert outcome(claim, found=8) == UNDECIDED
    assert decide([], found=10, expected=10).outcome == UNDECIDED
    assert "8 of 10 runs, too few" in decide([claim], found=8, expected=10).sentence


def test_the_number_of_claims_counts_against_each():
    values = [0.2, 1.8, 0.6, 1.5, 0.4]
    alone = decide([Claim("it", values, low=0)], found=1, expected=1)
    among = decide([Claim("it", values, low=0)] * 20, found=1, expected=1)
    assert alone.outcome == HELD
    assert among.outcome == UNDECIDED
    assert among.findings[0].level == pytest.approx(1 - 0.05 / 20)


def test_claims_of_noise_hold_as_rarely_as_they_should():
    rng = np.random.default_rng(0)
    outcomes = [
        outcome(*(Claim("it", list(rng.normal(size=6)), low=0) for _ in range(3)))
        for _ in range(400)
    ]
    assert outcomes.count(HELD) == 0
    # Each of three intervals of 1 - .05/3 lies wholly below 0 with half the rest.
    assert outcomes.count(NOT_HELD) < 0.025 * 400 + 4 * math.sqrt(0.025 * 400)


def test_the_sentence_names_every_number():
    verdict = decide(
        [Claim("width", TIGHT, low=0), Claim("height", TIGHT, low=2)],
        found=9,
        expected=10,
        remark="By hand.",
    )
    text = str(verdict)
    assert text.startswith("NOT HELD: 9 of 10 runs; width 0.99 [")
    assert "✗ height 0.99" in text
    assert "asked > 2" in text
    assert text.endswith("By hand.")


def test_mean_and_spread():
    assert mean_and_spread([1.0, 2.0, 3.0]) == "2 ± 1"
    assert mean_and_spread([2.5]) == "2.5"
    assert mean_and_spread([]) == "-"
    assert mean_and_spread([None, math.inf, 1.0]) == "1"
