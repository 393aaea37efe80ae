"""Verdict, table and figure of the records of a sweep."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .experiment import Experiment, Row, Settings
from .folder import Folder
from .outcome import UNDECIDED, Verdict

__all__ = ["Conclusion", "conclude", "draw", "of_folder"]


@dataclass(frozen=True)
class Conclusion:
    """What the records of one experiment and preset say.

    Attributes:
        records: one a task; those that failed too.
        rows: of the tasks that finished.
        expected: rows of the whole grid.
    """

    experiment: Experiment
    settings: Settings
    records: Sequence[dict[str, Any]]
    rows: list[Row]
    expected: int
    verdict: Verdict

    @property
    def failures(self) -> Counter[str]:
        """Messages of tasks that failed, with how often each came."""
        return Counter(r["message"] for r in self.records if r["status"] == "failed")

    @property
    def minutes(self) -> float:
        """Processor minutes of all tasks together."""
        return sum(r.get("processor_seconds", r["seconds"]) for r in self.records) / 60

    @property
    def provenance(self) -> dict[str, str]:
        """What made the records; several values are joined."""
        found = {}
        for name in ("fastminima", "torch", "machine", "commit", "code", "time"):
            values = sorted({str(r.get(name, "")) for r in self.records} - {""})
            if name == "time":
                values = [v[:10] for v in values[-1:]]
            found[name] = ", ".join(values)
        return found

    def as_json(self) -> dict[str, Any]:
        """All of it in values of JSON, less the rows."""
        verdict = self.verdict
        return {
            "id": self.experiment.id,
            "paper": self.experiment.paper,
            "claim": self.experiment.claim,
            "preset": self.settings.preset,
            "dataset": self.settings.dataset,
            "outcome": verdict.outcome,
            "sentence": verdict.sentence,
            "short": verdict.short,
            "findings": [
                {
                    "name": f.claim.name,
                    "mean": _number(f.mean),
                    "interval": [_number(f.low), _number(f.high)],
                    "level": f.level,
                    "values": [_number(v) for v in f.claim.values],
                    "asked": [_number(f.claim.low), _number(f.claim.high)],
                    "outcome": f.outcome,
                }
                for f in verdict.findings
            ],
            "runs": len(self.rows),
            "expected": self.expected,
            "failures": dict(self.failures),
            "processor_minutes": round(self.minutes, 2),
            "provenance": self.provenance,
        }


def conclude(
    experiment: Experiment, settings: Settings, records: Sequence[dict[str, Any]]
) -> Conclusion:
    """Judge records, which must be of these settings."""
    rows = [row for r in records if r["status"] == "finished" for row in r["rows"]]
    expected = experiment.expected(settings)
    if rows:
        verdict = experiment.judge(settings, rows, expected)
    else:
        verdict = Verdict(UNDECIDED, f"0 of {expected} runs finished.", ())
    return Conclusion(experiment, settings, records, rows, expected, verdict)


def of_folder(folder: Folder) -> Conclusion:
    """Judge a sweep, write what comes out to its verdict.json, and draw its figure."""
    done = folder.finished()
    records = [done[key] for key in folder.tasks if key in done]
    conclusion = conclude(folder.experiment, folder.settings, records)
    text = json.dumps(conclusion.as_json(), indent=1, ensure_ascii=False)
    (folder.path / "verdict.json").write_text(text + "\n")
    draw(conclusion, folder.path / "figure.png")
    return conclusion


def draw(conclusion: Conclusion, path: Path) -> list[Path]:
    """The figure of the rows, as PNG and PDF; none without rows."""
    from examples.common import plots

    if not conclusion.rows:
        return []
    figure = conclusion.experiment.draw(conclusion.settings, conclusion.rows)
    return plots.save(figure, path)


def _number(value: float) -> float | None:
    """A number of JSON; None for what it has none for."""
    return float(f"{value:.6g}") if value - value == 0 else None
