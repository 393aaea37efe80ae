"""What is wrong with a command itself, as against the code that it runs."""

from __future__ import annotations

__all__ = ["UsageError"]


class UsageError(ValueError):
    """A command that cannot be carried out as it was given; the message says why."""
