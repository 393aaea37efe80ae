"""The contributions of all uses of each parameter, until none is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..contributions import Contribution, joined
from ..errors import CaptureError

__all__ = ["Parts"]


class Parts:
    """Counts the uses of each parameter as they come, and joins what they bring.

    Args:
        missing: for each parameter, how many uses there are.
        is_own_pass: whether the probe itself runs the pass, for messages.
    """

    def __init__(self, missing: Mapping[str, int], *, is_own_pass: bool) -> None:
        self._missing, self._uses = dict(missing), missing
        self._is_own_pass = is_own_pass
        self._waiting: dict[str, list[Contribution]] = {}
        self._seen: dict[str, list[str]] = {}

    def __contains__(self, parameter: str) -> bool:
        """Whether the graph has uses of a parameter."""
        return parameter in self._missing

    @property
    def are_waiting(self) -> bool:
        """Whether there are contributions to parameters some of whose uses miss."""
        return bool(self._waiting)

    @property
    def most(self) -> int:
        """Uses of the parameter that has most of them left, one at least."""
        return max(1, *self._missing.values(), 1)

    def has_one_use(self, parameter: str) -> bool:
        """Whether a parameter is used once."""
        return self._uses.get(parameter) == 1

    def will_wait(self, parameter: str) -> bool:
        """Whether what the next use of a parameter brings waits for further ones."""
        return self._missing.get(parameter, 0) > 1

    def count(self, parameter: str, use: str) -> None:
        """Note that one of the uses of a parameter was seen.

        Raises:
            CaptureError: where there are more than the graph had.
        """
        missing = self._missing[parameter] = self._missing[parameter] - 1
        seen = self._seen.setdefault(parameter, [])
        seen.append(use)
        if missing < 0:
            raise CaptureError(
                f"Parameter {parameter!r} got gradients from more uses than the graph "
                f"had when it was read ({len(seen) - 1}): from {', '.join(seen)}. "
                + (
                    "A node ran twice: the loss was differentiated by two calls of "
                    "backward, or a hook called backward inside this one."
                    if self._is_own_pass
                    else "The graph changed between attach and backward, or the pass "
                    "ran part of it twice. Attach to the very loss that is "
                    "differentiated, right before backward."
                )
            )

    def add(self, parameter: str, part: Contribution, use: str) -> Contribution | None:
        """What all uses bring together; None while some are missing."""
        self.count(parameter, use)
        waiting = self._waiting.pop(parameter, None)
        if self._missing[parameter] > 0:
            self._waiting[parameter] = [*(waiting or ()), part.settled()]
            return None
        return part if waiting is None else joined([*waiting, part])

    def rest(self) -> Iterator[tuple[str, Contribution]]:
        """What there is of parameters some of whose uses got no gradient."""
        for parameter, parts in self._waiting.items():
            yield parameter, joined(parts)

    def clear(self) -> None:
        """Let go of what waits."""
        self._waiting.clear()
