"""The tables that the experiment ends with."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from .analysis import Row, at_end, at_loss, common_loss, correlation, spread
from .settings import Settings
from .verdict import CRITERIA, judge

__all__ = ["report"]

_NAMES = {"frobenius_norm": "1/‖H‖_F", "lambda_max": "1/λ_max", "trace": "1/tr H"}


def report(settings: Settings, records: Sequence[dict[str, Any]]) -> str:
    """Everything that the runs say, as text; ends with the sentence of the verdict."""
    end, loss = at_end(records), common_loss(records, settings.rungs)
    diverged = [r for r in records if r["status"] == "diverged"]
    if len({r.ratio for r in end}) < 2 or math.isnan(loss):
        return f"{len(end)} finished runs share no train loss yet: nothing to compare."
    matched = at_loss(records, loss)
    parts = [_cells(matched, end, loss)]
    if len(matched) < len(end):
        parts.append(f"{len(end) - len(matched)} runs did not reach that train loss.")
    if diverged:
        listed = ", ".join(
            sorted({f"({r['learning_rate']:g}, {r['batch_size']})" for r in diverged})
        )
        parts.append(f"{len(diverged)} runs diverged and are left out: {listed}.")
    parts.append(_correlations(records, settings.rungs, end, loss))
    parts.append(_spreads(matched, end, loss))
    parts.append(_covariance_against_hessian(records, settings.rungs))
    parts.append(CRITERIA)
    parts.append(judge(matched, end, loss).sentence)
    return "\n\n".join(parts)


def _cells(matched: Sequence[Row], end: Sequence[Row], loss: float) -> str:
    """One line for each (ratio, batch size): mean ± half the range over seeds."""
    head = ["eta/S", "eta", "S", "λ_max", "‖H‖_F", "tr H", "tr C", "temp.", "eta λ_max"]
    head += ["train loss", "λ_max", "‖H‖_F", "valid. acc."]
    at_match, at_the_end = _by_cell(matched), _by_cell(end)
    lines = []
    for (ratio, size), last in sorted(at_the_end.items()):
        then = at_match.get((ratio, size), [])
        rate = last[0].learning_rate
        lines.append([f"{ratio:.3g}", f"{rate:.3g}", f"{size}"])
        lines[-1] += [_spanned(then, k) for k in ("lambda_max", "frobenius_norm")]
        lines[-1] += [_mean(then, k) for k in ("trace", "covariance_trace")]
        lines[-1] += [_mean(then, "temperature"), _mean(then, "lambda_max", rate)]
        lines[-1] += [_mean(last, "train_loss"), _mean(last, "lambda_max")]
        lines[-1] += [_spanned(last, "frobenius_norm")]
        lines[-1] += [_spanned(last, "validation_accuracy")]
    title = "Mean ± half the range over seeds; left of the bar at train loss "
    title += f"{loss:g}, right at the end"
    return f"{title}\n{_align([head, *lines], bar_before=9)}"


def _correlations(
    records: Sequence[dict[str, Any]],
    rungs: Sequence[float],
    end: Sequence[Row],
    loss: float,
) -> str:
    """Spearman correlation of log width with log eta/S, at each loss and at the end."""
    lines = ["Spearman correlation of log width with log eta/S"]
    moments = {f"train loss {rung:g}": at_loss(records, rung) for rung in rungs}
    moments = {k: v for k, v in moments.items() if len(v) > 3} | {"the end": end}
    for moment, rows in moments.items():
        found = (
            f"{_NAMES[k]} {correlation(rows, k, sign=-1).rho:+.2f}" for k in _NAMES
        )
        lines.append(f"  at {moment:<16} {'   '.join(found)}   ({len(rows)} runs)")
    at_match = at_loss(records, loss)
    lines.append(f"  1/‖H‖_F at the end: {correlation(end, 'frobenius_norm', sign=-1)}")
    lines.append("Spearman correlation of validation accuracy with eta/S")
    for moment, rows in ((f"train loss {loss:g}", at_match), ("the end", end)):
        lines.append(f"  at {moment}: {correlation(rows, 'validation_accuracy')}")
    return "\n".join(lines)


def _spreads(matched: Sequence[Row], end: Sequence[Row], loss: float) -> str:
    lines = ["Largest over smallest (median over groups)"]
    for moment, rows in ((f"train loss {loss:g}", matched), ("the end", end)):
        for name in ("frobenius_norm", "lambda_max"):
            s = spread(rows, name)
            lines.append(
                f"  {_NAMES[name]} at {moment}: across beta at one ratio "
                f"{s.across_beta:.2f}, across ratios at one S {s.across_ratio:.2f}, "
                f"across seeds {s.across_seeds:.2f}; "
                f"width ∝ (eta/S)^{s.ratio_power:.2f} beta^{s.beta_power:.2f}"
            )
        each = "  ".join(
            f"{k:.3g}: {v:.2f}"
            for k, v in spread(rows, "frobenius_norm").by_ratio.items()
        )
        lines.append(f"    1/‖H‖_F across beta, ratio by ratio: {each}")
    return "\n".join(lines)


def _covariance_against_hessian(
    records: Sequence[dict[str, Any]], rungs: Sequence[float]
) -> str:
    """How far C = H, which part of the theory assumes, is true as training goes on."""
    found = []
    moments = [(f"train loss {r:g}", at_loss(records, r)) for r in rungs]
    for moment, rows in [*moments, ("the end", at_end(records))]:
        shares = [r.values["covariance_trace"] / r.values["trace"] for r in rows]
        if shares:
            found.append(f"{np.nanmedian(shares):.2g} at {moment}")
    return "tr C / tr H (1 where C = H), median over runs: " + ", ".join(found)


def _by_cell(rows: Sequence[Row]) -> dict[tuple[float, int], list[Row]]:
    cells: dict[tuple[float, int], list[Row]] = defaultdict(list)
    for row in rows:
        cells[row.ratio, row.batch_size].append(row)
    return cells


def _mean(rows: Sequence[Row], name: str, factor: float = 1.0) -> str:
    return f"{factor * np.mean([r.values[name] for r in rows]):.3g}" if rows else "-"


def _spanned(rows: Sequence[Row], name: str) -> str:
    """Mean ± half the range, to the third digit of the mean."""
    values = [r.values[name] for r in rows]
    if not values:
        return "-"
    middle, half = float(np.mean(values)), (max(values) - min(values)) / 2
    places = max(0, 2 - math.floor(math.log10(abs(middle)))) if middle else 0
    return f"{middle:.{places}f} ± {half:.{places}f}"


def _align(table: list[list[str]], bar_before: int) -> str:
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = []
    for line in table:
        cells = [c.rjust(w) for c, w in zip(line, widths, strict=True)]
        cells.insert(bar_before, "│")
        lines.append("  ".join(cells))
    return "\n".join(lines)
