"""`fastminima tail`: a run's last rows in the terminal, as it goes on."""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

from .._optional import require
from ..report import Run, open_run
from ..report.now import quantities
from ..report.page import summary
from ..report.sharpness import two_over_lr
from .usage import UsageError

__all__ = ["last_rows", "run"]

_OTHERWISE = "`pip install 'fastminima[cli]'`, or ask for --json"
_BAR = 12  # characters, of which the last but two is 2/eta
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_TRUTHS = ("is_finite", "sharpness/converged")
_SHOWN = (  # heading, name of the column, digits; the first ones on narrow terminals
    ("loss", "loss", 4),
    ("tr Σ", "gradient/covariance_trace", 3),
    ("|mean g|²", "gradient/mean_grad_sq_norm", 3),
    ("temperature", "factors/temperature", 3),
)


def run(options: argparse.Namespace) -> int:
    """Show the table, once or until interrupted."""
    if options.rows < 1:
        raise UsageError(f"--rows must be at least 1, got {options.rows}.")
    if not options.every > 0:
        raise UsageError(f"--every must be positive, got {options.every}.")
    found = open_run(options.run)
    try:
        if options.json:
            _print_json(found, options)
        else:
            _print_table(found, options)
    except KeyboardInterrupt:
        pass
    return 0


def last_rows(run: Run, count: int) -> list[dict[str, float | None]]:
    """The newest rows, with "sharpness/two_over_lr" where it can be told."""
    first = max(len(run.columns) - count, 0)
    rows: list[dict[str, float | None]] = [
        {"step": step} for step in run.columns.steps[first:].tolist()
    ]
    columns = {name: run.columns[name] for name in run.columns.names}
    columns["sharpness/two_over_lr"] = two_over_lr(run.columns)
    for name, column in columns.items():
        kept = column.where(column.at >= first)
        for at, value in zip(kept.at.tolist(), kept.values.tolist(), strict=True):
            known = value if math.isfinite(value) else None
            rows[at - first][name] = bool(value) if name in _TRUTHS else known
    return rows


def _print_json(run: Run, options: argparse.Namespace) -> None:
    """Once: one object of it all. Else: a row a line, as they come."""
    if options.once:
        rows = last_rows(run, options.rows)
        newest = run.spikes[-options.rows :]
        made = summary(run) | {"last_rows": rows, "last_spikes": newest}
        print(json.dumps(made, indent=1))
        return
    shown = max(len(run.columns) - options.rows, 0)
    while True:
        if len(run.columns) < shown:  # the file was written anew
            shown = 0
        fresh = len(run.columns) - shown
        for row in last_rows(run, fresh) if fresh else ():
            print(json.dumps(row), flush=True)
        shown += fresh
        time.sleep(options.every)
        run.refresh()


def _print_table(run: Run, options: argparse.Namespace) -> None:
    console = require("rich.console", "The table", _OTHERWISE).Console()
    width = console.width
    if options.once:
        console.print(_screen(run, options.rows, width))
        return
    live = require("rich.live", "The table", _OTHERWISE)
    with live.Live(_screen(run, options.rows, width), console=console) as shown:
        while True:
            time.sleep(options.every)
            if run.refresh():
                shown.update(_screen(run, options.rows, console.width), refresh=True)


def _screen(run: Run, count: int, width: int) -> Any:
    """The table, the quantities as they stand, and the newest spikes."""
    group = require("rich.console", "The table", _OTHERWISE).Group
    text = require("rich.text", "The table", _OTHERWISE).Text
    lines = [text.assemble((_first_line(run), "dim"))]
    lines += [
        text.assemble(
            (f"{q.name} ", "bold"),
            _told(q.value, q.low, q.high),
            " ",
            _bar(_newest(run)) if q.name.startswith("sharpness") else "",
        )
        for q in quantities(run)
        if q.name in ("noise scale", "sharpness λ₁")
    ]
    lines += [text.assemble((_spike(s), "yellow")) for s in run.spikes[-3:]]
    return group(_table(last_rows(run, count), width), *lines)


def _newest(run: Run) -> dict[str, float | None]:
    """The last sharpness that was measured, and what it is compared with."""
    column, limits = run.columns["sharpness/eigenvalue_1"], two_over_lr(run.columns)
    before = limits.where(limits.at <= column.at[-1])
    return {
        "sharpness/eigenvalue_1": column.last,
        "sharpness/two_over_lr": before.last if before.last > 0 else None,
    }


def _table(rows: list[dict[str, float | None]], width: int) -> Any:
    table = require("rich.table", "The table", _OTHERWISE).Table(
        box=None, pad_edge=False, header_style="bold"
    )
    names = {name for row in rows for name in row}
    most = len(_SHOWN) if width >= 105 else 1 if width < 90 else 2
    shown = [one for one in _SHOWN if one[1] in names][:most]
    has_scale = any(name.startswith("gradient/noise_scale") for name in names)
    has_sharpness = "sharpness/eigenvalue_1" in names
    table.add_column("step", justify="right")
    for heading, _, _ in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    if has_scale:
        table.add_column("noise scale (95 %)", justify="right", no_wrap=True)
        table.add_column("batch", justify="right")
    if has_sharpness:
        table.add_column("λ₁", justify="right")
        table.add_column("λ₁ beside 2/η ┆", no_wrap=True)
    for row in rows:
        cells = [_number(row["step"], 9)]
        cells += [_number(row.get(name), digits) for _, name, digits in shown]
        if has_scale:
            cells += [_scale(row), _number(row.get("factors/batch_size"), 6)]
        if has_sharpness:
            cells += [_number(row.get("sharpness/eigenvalue_1"), 4), _bar(row)]
        table.add_row(*cells, style=None if row.get("is_finite", 1) else "red")
    return table


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _scale(row: dict[str, float | None]) -> str:
    """The smoothed noise scale with its interval; one step's where there is none."""
    name = "gradient/noise_scale"
    value = row.get(f"{name}_smoothed", row.get(name))
    if value is None:
        return ""
    # A signal that is estimated below zero gives no ratio, but still a lower end.
    told = f"{value:.3g}" if value > 0 else "?"
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    if low is None and high is None:
        return told
    upper = "∞" if high is None else f"{high:.3g}"
    return f"{told} ({_number(low, 3) or '0'}-{upper})"


def _bar(row: dict[str, float | None]) -> Any:
    """Sharpness in parts of 2/eta, which is a mark; in another colour above it."""
    text = require("rich.text", "The table", _OTHERWISE).Text
    value, limit = row.get("sharpness/eigenvalue_1"), row.get("sharpness/two_over_lr")
    if value is None or limit is None:
        return text("")
    part, edge = value / limit, _BAR - 2
    filled = round(8 * edge * min(max(part, 0.0), _BAR / edge))
    bar = "█" * (filled // 8) + (_EIGHTHS[filled % 8] if filled % 8 else "")
    bar = bar.ljust(_BAR)
    if bar[edge] == " ":
        bar = bar[:edge] + "┆" + bar[edge + 1 :]
    return text.assemble((bar, "red" if part > 1 else "blue"), f" {part:.0%}")


def _first_line(run: Run) -> str:
    about = run.about
    words = [run.name, str(about.get("model", "")), f"{len(run.columns)} rows"]
    if run.spikes:
        words.append(f"{len(run.spikes)} spikes")
    if run.skipped:
        words.append(f"{run.skipped} lines not read")
    return " · ".join(word for word in words if word)


def _told(value: float, low: float, high: float) -> str:
    told = f"{value:.4g}" if math.isfinite(value) else "not known"
    if not (math.isfinite(low) or math.isfinite(high)):
        return told
    upper = f"{high:.4g}" if math.isfinite(high) else "no upper end"
    return f"{told} ({_number(low, 4)} to {upper})"


def _spike(spike: dict[str, Any]) -> str:
    samples = spike.get("samples") or []
    who = ", ".join(str(s.get("id", s.get("index"))) for s in samples[:3])
    value = spike.get("value")
    told = f"{value:.4g}" if isinstance(value, (int, float)) else "not finite"
    return f"spike at step {spike.get('step')}: {spike.get('what')} {told}; {who}"
