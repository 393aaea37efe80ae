"""Samples of very different lengths, a session for those of about one length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from ..graph.tape import Tape
from .collector import Collected
from .hooks import Session
from .norms import Norms

__all__ = ["GroupedSession"]


class GroupedSession:
    """Sessions over one graph, each for some of the samples, as if they were one.

    Rows of a sample are padded to the longest of its session, so a long one should not
    be in a session with many short ones. The Gram matrix has no such form.

    Args:
        sessions: one for each group; the first one reads the gradients.
        groups: which samples each of them looks at, by their places in the result.
        count: number of samples altogether.
    """

    def __init__(
        self, sessions: Sequence[Session], groups: Sequence[Tensor], count: int
    ) -> None:
        self._sessions, self._groups, self._count = sessions, groups, count

    @classmethod
    def of(
        cls,
        groups: Sequence[Tensor],
        count: int,
        make: Callable[[Tensor, bool], Session],
    ) -> GroupedSession:
        """With `make(group, is_first)` for each group; all of them, or none."""
        sessions: list[Session] = []
        try:
            for group in groups:
                sessions.append(make(group, not sessions))
        except BaseException:
            for session in sessions:
                session.close()
            raise
        return cls(sessions, groups, count)

    def close(self) -> None:
        """Remove every hook and let go of what waits."""
        for session in self._sessions:
            session.close()

    @property
    def owner(self) -> object:
        """Whom the passes belong to that are run for these sessions."""
        return self._sessions[0].owner

    def separate(self, tape: Tape, names: Iterable[str]) -> None:
        """Read some parameters' gradients where they leave this graph, from now on."""
        self._sessions[0].separate(tape, names)

    def take_gradients(self, grads: Mapping[str, Tensor]) -> None:
        """Note the gradients of some parameters in this pass."""
        self._sessions[0].take_gradients(grads)

    def read_gradients(self) -> None:
        """Note the gradients of this pass, all there is in `.grad` now."""
        self._sessions[0].read_gradients()

    def finish(self) -> Collected:
        """What all sessions gathered together; removes the hooks."""
        parts = [session.finish() for session in self._sessions]
        return Collected(
            sq_norms=Norms(_apart=self._scattered([part.sq_norms for part in parts])),
            second_moments=_added([part.second_moments for part in parts]),
            dots=self._scattered([part.dots for part in parts]),
            grad_sq_norms=parts[0].grad_sq_norms,
            grad_sq_norms_by_parameter=parts[0].grad_sq_norms_by_parameter,
            grads=parts[0].grads,
        )

    def _scattered(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Numbers of single samples, back in their places."""
        joined: dict[str, Tensor] = {}
        for group, part in zip(self._groups, parts, strict=True):
            for name, numbers in part.items():
                if name not in joined:
                    joined[name] = numbers.new_zeros(self._count)
                joined[name][group.to(numbers.device)] = numbers
        return joined


def _added(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sums over samples."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, t in part.items():
            total[name] = total[name] + t if name in total else t
    return total
