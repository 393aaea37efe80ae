"""A task in phases, each of which can be killed and goes on where it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from examples.engine.experiment import Watch

__all__ = ["Phases"]


@dataclass
class Phases:
    """Does phases in turn; what the finished ones gave is kept with the state.

    Attributes:
        watch: of the task.
        count: of the phases, for progress.
    """

    watch: Watch
    count: int
    _done: dict[str, Any] = field(default_factory=dict)
    _open: tuple[str, Any] | None = None

    def __post_init__(self) -> None:
        saved = self.watch.load()
        if saved is not None:
            self._done, self._open = saved["done"], saved["open"]

    def do(self, name: str, phase: Callable[[Watch], Any]) -> Any:
        """The result of a phase, which is given a watch of its own."""
        if name not in self._done:
            self._done[name] = phase(_Part(self, name))
            self._open = None
        self.watch.progress(len(self._done) / self.count)
        return self._done[name]


@dataclass
class _Part:
    """The watch of one phase."""

    phases: Phases
    name: str

    def progress(self, fraction: float) -> None:
        p = self.phases
        p.watch.progress((len(p._done) + fraction) / p.count)

    def load(self) -> Any:
        is_open = self.phases._open
        return is_open[1] if is_open is not None and is_open[0] == self.name else None

    def save(self, state: Callable[[], Any]) -> None:
        done = self.phases._done
        self.phases.watch.save(lambda: {"done": done, "open": (self.name, state())})
