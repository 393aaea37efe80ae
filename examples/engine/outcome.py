"""HELD, NOT HELD or UNDECIDED: claims as intervals of values seed by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "HELD",
    "NOT_HELD",
    "OUTCOMES",
    "UNDECIDED",
    "Claim",
    "Finding",
    "Verdict",
    "decide",
    "mean_and_spread",
]

HELD, NOT_HELD, UNDECIDED = OUTCOMES = ("HELD", "NOT HELD", "UNDECIDED")

# Of all claims of one verdict together: each is tested at this over their number.
ERROR = 0.05
# Fewer finished runs than this share of the grid decide nothing.
COVERAGE = 0.9
# Fewer values than this have no interval worth the name.
FEWEST = 3


@dataclass(frozen=True)
class Claim:
    """That the mean of independent values lies above `low` and below `high`.

    Attributes:
        name: what is measured, as the sentence says it.
        values: one a seed, paired over the grid where the seeds are.
        low, high: open bounds; -inf or inf for none.
        digits: significant ones in the sentence.
    """

    name: str
    values: Sequence[float]
    low: float = -math.inf
    high: float = math.inf
    digits: int = 2


@dataclass(frozen=True)
class Finding:
    """A claim with its interval and what that says of it."""

    claim: Claim
    mean: float
    low: float
    high: float
    level: float
    outcome: str

    def __str__(self) -> str:
        c, n = self.claim, len(self.claim.values)
        if math.isnan(self.low):
            return f"{c.name}: {n} values decide nothing"
        shown = [f"{v:.{c.digits}g}" for v in (self.mean, self.low, self.high)]
        asked = _asked(c)
        return f"{c.name} {shown[0]} [{shown[1]}, {shown[2]}] (n {n}; asked {asked})"


@dataclass(frozen=True)
class Verdict:
    """What the records say.

    Attributes:
        outcome: HELD where every claim holds; NOT HELD where the interval of one lies
            on the other side; UNDECIDED otherwise, or with too few runs.
        sentence: by which numbers.
        findings: the claims, with intervals that hold together with 95 %.
        table: of the numbers behind, as text.
        short: the numbers for one cell of a table.
    """

    outcome: str
    sentence: str
    findings: tuple[Finding, ...]
    table: str = ""
    short: str = ""

    def __str__(self) -> str:
        return f"{self.outcome}: {self.sentence}"


def decide(
    claims: Sequence[Claim],
    *,
    found: int,
    expected: int,
    table: str = "",
    short: str = "",
    remark: str = "",
) -> Verdict:
    """Judge all claims together, with Bonferroni's intervals over their number.

    Args:
        claims: all must hold; their number is counted against each.
        found, expected: runs that finished, and those of the whole grid.
        table, short: passed on.
        remark: added to the sentence.
    """
    level = 1 - ERROR / max(1, len(claims))
    findings = tuple(_judge(claim, level) for claim in claims)
    outcomes = {f.outcome for f in findings}
    if found < COVERAGE * expected or not findings:
        outcome = UNDECIDED
    elif NOT_HELD in outcomes:
        outcome = NOT_HELD
    else:
        outcome = HELD if outcomes == {HELD} else UNDECIDED
    parts = [f"{_mark(f)}{f}" for f in findings]
    if found < expected:
        enough = "" if found >= COVERAGE * expected else ", too few to decide"
        parts.insert(0, f"{found} of {expected} runs{enough}")
    sentence = "; ".join(parts) + "." + (f" {remark}" if remark else "")
    return Verdict(outcome, sentence, findings, table, short or "; ".join(parts))


def mean_and_spread(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds, "12.3 ± 0.4"; one value stands alone.

    Of the finite ones: None, as rows have it for what is no number, is left out.
    """
    finite = [v for v in values if v is not None and math.isfinite(v)]
    if not finite:
        return "-"
    mean = f"{np.mean(finite):.{digits}g}"
    if len(finite) == 1:
        return mean
    spread = float(np.std(finite, ddof=1))
    if spread < 1e-12 * abs(float(np.mean(finite))):
        spread = 0.0  # rounding of equal values
    return f"{mean} ± {spread:.{max(1, digits - 1)}g}"


def _judge(claim: Claim, level: float) -> Finding:
    values = np.asarray(claim.values, dtype=float)
    if len(values) < FEWEST or not np.isfinite(values).all():
        nan = math.nan
        return Finding(claim, nan, nan, nan, level, UNDECIDED)
    mean = float(values.mean())
    low, high = _interval(values, level)
    if low > claim.low and high < claim.high:
        outcome = HELD
    elif high < claim.low or low > claim.high:
        outcome = NOT_HELD
    else:
        outcome = UNDECIDED
    return Finding(claim, mean, low, high, level, outcome)


def _interval(values: np.ndarray, level: float) -> tuple[float, float]:
    """Student's interval for the mean."""
    from scipy import stats

    n, mean = len(values), float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    return mean - half, mean + half


def _asked(claim: Claim) -> str:
    if claim.low == -math.inf:
        return f"< {claim.high:.3g}"
    if claim.high == math.inf:
        return f"> {claim.low:.3g}"
    return f"{claim.low:.3g} … {claim.high:.3g}"


def _mark(finding: Finding) -> str:
    return {HELD: "", NOT_HELD: "✗ ", UNDECIDED: "? "}[finding.outcome]
