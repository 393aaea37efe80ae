"""What is closed at the end of a `with` block."""

from __future__ import annotations

from typing import TypeVar

__all__ = ["Closing"]

_Own = TypeVar("_Own", bound="Closing")


class Closing:
    """A context manager that calls its own `close` at the end; an interface."""

    def close(self) -> None:
        """Release what is held; more than once does no harm."""
        raise NotImplementedError

    def __enter__(self: _Own) -> _Own:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
