"""A recorder whose vectors are the means over all ranks, where there are several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from ._ranks import Said
from ._recorder import Recorder
from ._same import fingerprint

__all__ = ["JointRecorder"]

_LOOK_EVERY = 32  # products of a kept graph between looks at the loss
T = TypeVar("T")


class JointRecorder(Recorder):
    """Looks, and passes over the data, whose outcome all ranks share.

    What one rank finds out by itself (its batch has changed, its loss is another) goes
    with its part of the next product; so all ranks make the same products, and decide
    by the same numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        closures: Sequence[Callable[..., Any]],
        data: Any,
        count: Callable[[Any], int] | None,
        process_group: Any = None,
    ) -> None:
        super().__init__(model, closures, data, count, process_group)
        self._print = 0  # of the parameters recorded with
        self._is_begun = self._is_asked = False
        self._is_outdated = self._is_other_on_a_rank = False

    def _start(self) -> None:
        """A solver starts: look at the loss before the next pass."""
        if self._ranks is None:
            self._drop_if_outdated()
        else:
            self._is_begun = True

    def _ask_for_product(self) -> None:
        """The next pass is a product that was asked for."""
        if self._ranks is None:
            self._is_outdated = self._is_loss_another()
        else:
            self._is_asked = True

    def _drop_if_outdated(self) -> None:
        if self._kept is not None and self._kept is self._compared:
            return
        if self._is_kept() and self._kept is not None and not self._says_the_same():
            self._kept = None
            self._checks.forget()

    def _is_loss_another(self) -> bool:
        """Now and then, whether the loss is not what the kept graph says."""
        kept = self._kept
        if kept is None:
            return False
        kept.uses += 1
        is_due = kept.uses % _LOOK_EVERY == 0
        return is_due and self._is_kept() and not self._says_the_same()

    def _retried(self, make: Callable[[], T]) -> T:
        try:
            return make()
        except RuntimeError as error:
            # Something that the snapshot does not know was overwritten in place.
            if self._kept is None or "inplace operation" not in str(error):
                raise
            self._kept = None
            return make()

    @contextlib.contextmanager
    def _together(self, count: int, extra: int = 0) -> Iterator[None]:
        """Around this rank's part of `count` vectors and some numbers."""
        if self._ranks is None:
            yield
            return
        like = torch.zeros((), dtype=self._layout.dtype, device=self._layout.device)
        self._gather()
        with self._ranks.together(like, count * self._layout.size, extra):
            self._look()
            yield

    def _raise_on_all(self, error: ValueError, columns: int) -> NoReturn:
        """Raise what a product with so many columns met before it began."""
        with self._together(*self._message(columns)):
            raise error

    def _message(self, columns: int) -> tuple[int, int]:
        """How many vectors and numbers the message of such a product has."""
        return max(columns, 1), 0

    def _gather(self) -> None:
        """Put shards together, if any rank's have changed."""
        if self._shards is None or self._ranks is None:
            return
        if self._ranks.any(self._shards.have_changed(), self._layout.device):
            self._kept = None
            self._shards.gather()

    def _look(self) -> None:
        if self._is_begun:
            self._drop_if_outdated()
        self._is_outdated = self._is_asked and self._is_loss_another()
        self._is_begun = self._is_asked = False
        self._graph_before = self._kept

    def _said(self, columns: Sequence[Tensor]) -> Said:
        """What this rank says with its part of a pass."""
        if self._kept is None or self._kept is not self._graph_before:
            # Copies of shards are the same by the way they are made.
            tensors = [] if self._shards else list(self._model.parameters())
            self._print = fingerprint(tensors)
        loss, samples = self._checks.finished_pass()
        dtype, saturates = self._checks.surveyed()
        return Said(
            weight=samples,
            loss=loss,
            is_fresh=self._checks.noise is None,
            has_moved=self._checks.is_other(self._versions()),
            is_outdated=self._is_outdated,
            dtype=dtype,
            saturates=saturates,
            columns=fingerprint(columns),
            parameters=self._print,
        )

    def _hear(self, joint: Said) -> None:
        """Go on from what all ranks said."""
        if joint.is_fresh and self._checks.noise is not None:
            self._checks.forget()
        self._checks.join(joint)
        self._is_outdated = joint.is_outdated
        self._is_other_on_a_rank = joint.has_moved
