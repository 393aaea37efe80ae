"""What a doctor says: one line of a verdict, and why."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ORDER", "Finding", "some"]

ORDER = ("refused", "slow", "note", "ok")


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        verdict: "refused", "slow", "note" (right, and good to know) or "ok".
        subject: what was looked at.
        what: was found.
        why: it is so.
        remedy: what to do.
    """

    verdict: str
    subject: str
    what: str
    why: str = ""
    remedy: str = ""


def some(names: list[str], most: int = 4) -> str:
    """The first few of some names."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
