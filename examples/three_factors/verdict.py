"""Whether the claim held, by criteria that are stated and computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .analysis import Correlation, Row, Spread, correlation, spread

__all__ = ["CRITERIA", "Verdict", "judge"]

CRITERIA = """\
Criteria: (1) at matched train loss log width, 1/‖H‖_F and 1/λ_max, has a Spearman
correlation with log eta/S that is positive with p < 0.01; (2) in the fit of that width
to (eta/S)^a beta^b over all runs |b| < a/2 (were it the ratio alone, b = 0; eta alone,
b = a; S alone, a = 0); (3) validation accuracy correlates with eta/S, positive with
p < 0.01, at the end and at matched train loss. HELD is all three."""

_MEASURES = ("frobenius_norm", "lambda_max")


@dataclass(frozen=True)
class Verdict:
    """The three criteria, and the numbers that decided them."""

    width: dict[str, Correlation]
    width_at_end: dict[str, Correlation]
    spread: dict[str, Spread]
    accuracy: Correlation
    accuracy_at_loss: Correlation
    loss: float

    @property
    def width_rises(self) -> bool:
        """Criterion 1."""
        return all(_rises(c) for c in self.width.values())

    @property
    def ratio_decides(self) -> bool:
        """Criterion 2; false where there is nothing to compare."""
        return all(abs(s.beta_power) < s.ratio_power / 2 for s in self.spread.values())

    @property
    def accuracy_rises(self) -> bool:
        """Criterion 3."""
        return _rises(self.accuracy) and _rises(self.accuracy_at_loss)

    @property
    def sentence(self) -> str:
        """One sentence for the end of the output."""
        norm, s = self.width["frobenius_norm"], self.spread["frobenius_norm"]
        end = self.width_at_end["frobenius_norm"]
        return (
            f"The claim {self._outcome}: at train loss {self.loss:g} the width 1/‖H‖_F "
            f"{_verb(norm)} with eta/S (Spearman {norm.rho:+.2f}; at the end "
            f"{end.rho:+.2f}), it goes as (eta/S)^{s.ratio_power:.2f} "
            f"beta^{s.beta_power:.2f} (a factor {s.across_ratio:.2f} between ratios, "
            f"{s.across_beta:.2f} between batch sizes at one ratio); validation "
            f"accuracy {_verb(self.accuracy)} with it at the end "
            f"({self.accuracy.rho:+.2f}), {_verb(self.accuracy_at_loss)} with it at "
            f"train loss {self.loss:g} ({self.accuracy_at_loss.rho:+.2f})."
        )

    @property
    def _outcome(self) -> str:
        if not self.width_rises:
            return "DID NOT HOLD"
        if not self.ratio_decides:
            return "HELD IN PART (width follows the ratio, but the batch size too)"
        return "HELD" if self.accuracy_rises else "HELD FOR THE WIDTH, not for accuracy"


def judge(matched: Sequence[Row], end: Sequence[Row], loss: float) -> Verdict:
    """Apply the criteria to the runs at one train loss and at their ends."""
    return Verdict(
        width={k: correlation(matched, k, sign=-1) for k in _MEASURES},
        width_at_end={k: correlation(end, k, sign=-1) for k in _MEASURES},
        spread={k: spread(matched, k) for k in _MEASURES},
        accuracy=correlation(end, "validation_accuracy"),
        accuracy_at_loss=correlation(matched, "validation_accuracy"),
        loss=loss,
    )


def _rises(c: Correlation) -> bool:
    return c.rho > 0 and c.p < 0.01


def _verb(c: Correlation) -> str:
    if c.p < 0.01:
        return "rises" if c.rho > 0 else "falls"
    return "does not clearly change"
