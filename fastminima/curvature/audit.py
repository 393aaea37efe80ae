"""What an audit of an operator found, line by line."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["CurvatureAudit", "CurvatureCheck", "refuse_ranks"]

_WIDTH = 88
_ORDER = ("WRONG", "untold", "note", "ok")


@dataclass(frozen=True)
class CurvatureCheck:
    """One line of an audit.

    Attributes:
        name: What was asked, such as "symmetry".
        looked_at: By what it was looked at.
        met: What was found.
        error: As a number, relative, where there is one.
        allowed: How large that may be.
        verdict: "ok"; "WRONG"; "note", for what is right and good to know; "untold",
            where it cannot be told here, and why is in `met`.
        remedy: What to do.
    """

    name: str
    looked_at: str
    met: str
    error: float | None = None
    allowed: float | None = None
    verdict: str = "ok"
    remedy: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, as far as could be told."""
        return self.verdict != "WRONG"


@dataclass(frozen=True, repr=False)
class CurvatureAudit:
    """The result of an operator's `audit()`; prints as a table.

    Attributes:
        operator: Its class and size.
        checks: The lines.
    """

    operator: str
    checks: tuple[CurvatureCheck, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, as far as could be told."""
        return all(check.ok for check in self.checks)

    def __getitem__(self, name: str) -> CurvatureCheck:
        """The line of a name; of several the first that is wrong, or else untold."""
        found = [check for check in self.checks if check.name == name]
        if not found:
            known = ", ".join(dict.fromkeys(check.name for check in self.checks))
            raise KeyError(f"No line {name!r} in this audit. Its lines: {known}.")
        return min(found, key=lambda check: _ORDER.index(check.verdict))

    def to_dict(self) -> dict[str, list[Any]]:
        """Columns of a table with a row a check: `pandas.DataFrame(...)`."""
        names = [field.name for field in fields(CurvatureCheck)]
        return {name: [getattr(c, name) for c in self.checks] for name in names}

    def __repr__(self) -> str:
        return str(self)  # where a notebook shows the last value, the table is wanted

    def __str__(self) -> str:
        table = [("check", "error", "allowed", "", "looked at")]
        table += [
            (c.name, _number(c.error), _number(c.allowed), c.verdict, c.looked_at)
            for c in self.checks
        ]
        widths = [max(len(line[i]) for line in table) for i in range(4)]
        lines = [self.operator]
        for line, check in zip(table, (None, *self.checks), strict=True):
            cells = [cell.ljust(w) for cell, w in zip(line, widths, strict=False)]
            lines.append("  ".join([*cells, line[4]]).rstrip())
            if check is not None:
                lines += _wrapped(check.met) + _wrapped(check.remedy, "-> ")
        wrong = sum(not check.ok for check in self.checks)
        untold = sum(check.verdict == "untold" for check in self.checks)
        verdict = f"{wrong} WRONG" if wrong else "nothing wrong"
        lines.append(f"{verdict}, {untold} untold" if untold else verdict)
        return "\n".join(lines)


def refuse_ranks(ranks: Any) -> None:
    """ValueError where several ranks have the data between them."""
    if ranks is not None:
        raise ValueError(
            "Several ranks have the data of this operator between them, and an audit "
            "looks at one process: it evaluates and moves parameters where the others "
            "would have to as well. Audit an operator of the plain model (ddp.module) "
            "on one rank's batch."
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _wrapped(text: str, mark: str = "") -> list[str]:
    indent = "    " + mark
    below = " " * len(indent)
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=below)
