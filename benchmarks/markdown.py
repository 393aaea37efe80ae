"""Draws the tables from a record, as Markdown."""

from __future__ import annotations

import statistics

from benchmarks.providers import by_name

__all__ = ["render"]

TITLES = {
    "norms": "per-sample norms (ratio to the plain step)",
    "second_moments": "second moments (ratio to the plain step)",
    "memory": "peak memory growth, MiB (in brackets: above the plain step's)",
    "product": "one Hessian product, in gradients",
    "eigenvalue": "largest eigenvalue: products / cost in gradients / worst error",
}


def render(record: dict) -> str:
    """All tables of a record, with what they were measured on."""
    notes = Notes()
    parts = [_header(record["run"])]
    for table, columns in record["tables"].items():
        parts.append(_table(table, columns, notes))
    if notes.lines:
        parts.append("\n".join(notes.lines))
    return "\n\n".join(parts) + "\n"


class Notes:
    """Numbered footnotes, each text once."""

    def __init__(self):
        self.lines: list[str] = []
        self.numbers: dict[str, int] = {}

    def mark(self, text: str) -> str:
        if text not in self.numbers:
            self.numbers[text] = len(self.numbers) + 1
            self.lines.append(f"[{self.numbers[text]}] {text}  ")
        return f" [{self.numbers[text]}]"


def _header(run: dict) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in run["versions"].items())
    commit = (run["commit"] or "unknown")[:8] + (" modified" if run["modified"] else "")
    return (
        f"Measured {run['when']} at commit {commit} on {run['cpu']}, "
        f"{run['cores']} cores, {run['threads']} threads, "
        f"{run['cpu_capability']}.\n{versions}."
    )


def _table(table: str, columns: dict, notes: Notes) -> str:
    draw = {"memory": _memory_cell, "eigenvalue": _eigenvalue_cell}.get(
        table, _ratio_cell
    )
    names = list(dict.fromkeys(name for cells in columns.values() for name in cells))
    rows = [name for name in names if not name.startswith("plain")]
    head = f"| {TITLES[table]} | " + " | ".join(columns) + " |"
    lines = [head, "|---" * (len(columns) + 1) + "|", _plain_row(table, columns)]
    for name in rows:
        cells = [
            draw(cells[name], cells, notes) if name in cells else "-"
            for cells in columns.values()
        ]
        lines.append(f"| {_label(name)} | " + " | ".join(cells) + " |")
    return "\n".join(line for line in lines if line)


def _label(name: str) -> str:
    """A provider's label; memory rows may name the measure after the provider."""
    provider, _, measure = name.partition(" ")
    label = by_name(provider).label
    return f"{label}, {measure.replace('_', ' ')}" if measure else label


def _plain_row(table: str, columns: dict) -> str:
    def cell(cells: dict) -> str:
        plain = cells.get("plain", {})
        if table == "memory":
            return f"{plain['growth']:.0f}" if "growth" in plain else "-"
        if "seconds" in plain:
            return f"{plain['seconds']['median'] * 1e3:.1f} ms"
        return "-"

    if table == "eigenvalue":
        return ""
    cells = " | ".join(cell(cells) for cells in columns.values())
    what = "plain gradient" if table == "product" else "plain step"
    return f"| {what} | {cells} |"


def _unmeasured(cell: dict, notes: Notes) -> str | None:
    if cell.get("skipped"):
        return "-" + notes.mark(cell["skipped"])
    if not cell["right"]:
        return f"wrong: {100 * cell['worst_error']:+.2g} %"
    return None


def _ratio_cell(cell: dict, cells: dict, notes: Notes) -> str:
    if text := _unmeasured(cell, notes):
        return text
    ratio = cell["ratio"]
    digits = 1 if ratio["value"] >= 10 else 2
    spread = (ratio["high"] - ratio["low"]) / 2
    mark = notes.mark(cell["note"]) if cell.get("note") else ""
    return f"{ratio['value']:.{digits}f} ± {spread:.{digits}f}{mark}"


def _memory_cell(cell: dict, cells: dict, notes: Notes) -> str:
    if text := _unmeasured(cell, notes):
        return text
    extra = cell["growth"] - cells[cell.get("baseline", "plain")]["growth"]
    mark = notes.mark(cell["note"]) if cell.get("note") else ""
    return f"{cell['growth']:.0f} ({extra:+.0f}){mark}"


def _eigenvalue_cell(cell: dict, cells: dict, notes: Notes) -> str:
    if text := _unmeasured(cell, notes):
        return text
    products = statistics.median(cell["products"])
    cost = statistics.median(cell["gradients"])
    return f"{products:g} / {cost:.0f} / {100 * cell['worst_error']:+.2f} %"
