"""What the ranks of a process group say to each other, in one message a product."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._processes import find_group
from ._finite import NotFiniteError
from ._replicas import replicas

__all__ = ["Ranks", "Said", "ranks_of"]

_BITS = 32  # of a fingerprint
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Said:
    """What a rank says beside its vectors, or all together.

    Attributes:
        weight: number of samples.
        loss: mean loss.
        is_fresh: whether the operator has yet to be compared with itself.
        has_moved: whether parameters or buffers have been written since the last pass.
        is_outdated: whether the loss is another than what the graph was recorded from.
        dtype: the narrowest that the graph computes in; None if it is known.
        saturates: whether the graph has probabilities.
        columns: fingerprint of the vectors to multiply.
        parameters: fingerprint of the parameters.
    """

    weight: float = 0.0
    loss: float = 0.0
    is_fresh: bool = False
    has_moved: bool = False
    is_outdated: bool = False
    dtype: torch.dtype | None = None
    saturates: bool = False
    columns: int = 0
    parameters: int = 0

    def numbers(self, unit: float) -> list[float]:
        """As numbers of which sums over ranks tell all that is to be known."""
        share = self.weight / unit
        flags = self.is_fresh, self.has_moved, self.is_outdated, self.saturates
        return [
            *(share, share * self.loss, self.weight),
            *map(float, flags),
            *(float(dtype == self.dtype) for dtype in _DTYPES),
            *_bits(self.columns),
            *_bits(self.parameters),
        ]


def _bits(number: int) -> list[float]:
    return [float(number >> i & 1) for i in range(_BITS)]


class Ranks:
    """The ranks of a process group, each with its share of the data.

    A message is the rank's vectors, weighted with its number of samples, and after them
    what it says; all of it is added up in one reduction. So all ranks see the same
    numbers and decide alike, and one in trouble is heard by the others.

    Args:
        group: the process group.

    Raises:
        ValueError, RuntimeError: on every rank, when one of them raises.
    """

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        self._dist = dist
        self.group, self.size = group, dist.get_world_size(group)
        # By what weights are divided, so that sums do not grow with them: the same on
        # all ranks, and a power of two, so that the bits of a product do not change.
        self._unit = self._unit_before = 1.0

    @contextlib.contextmanager
    def together(self, like: Tensor, size: int, extra: int = 0) -> Iterator[None]:
        """Around a rank's own work: its exception is raised on the others too.

        Their message has `size` numbers of vectors like this one, and `extra`.
        """
        is_done = False
        try:
            yield
            is_done = True
        finally:
            error = sys.exc_info()[1]
            if not is_done and isinstance(error, Exception):
                message = like.new_zeros(size + _HEAD + extra)
                message[size] = 1
                self._dist.all_reduce(message, group=self.group)
                self._explain(error)

    def mean(self, vectors: Sequence[Tensor], said: Said) -> tuple[list[Tensor], Said]:
        """The mean of the ranks' vectors by their weights, and what they all say.

        Vectors are used up.

        Raises:
            ValueError: the ranks multiply different vectors, or have different
                parameters.
            RuntimeError: a rank was in trouble.
        """
        share = said.weight / self._unit
        whole, _, joint = self.total([v.mul_(share) for v in vectors], said)
        scale = joint.weight / self._unit_before
        return [v.div_(scale) for v in whole], joint

    def total(
        self, vectors: Sequence[Tensor], said: Said, extra: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor, Said]:
        """The sums of the ranks' vectors and extra numbers, and what they all say.

        Raises:
            ValueError, RuntimeError: as `mean`.
        """
        like = vectors[0]
        numbers = [0.0, *said.numbers(self._unit)]
        head = torch.tensor(numbers, dtype=like.dtype, device=like.device)
        extra = like.new_zeros(0) if extra is None else extra.to(like)
        message = torch.cat([*vectors, head, extra])
        self._dist.all_reduce(message, group=self.group)
        length = len(vectors) * len(like)
        trouble, *sums = message[length : length + _HEAD].tolist()
        if trouble:
            self._explain(None)
        joint = self._read(sums)
        self._unit_before = self._unit
        self._unit = 2.0 ** math.frexp(joint.weight)[1]
        whole = list(message[:length].split(len(like)))
        return whole, message[length + _HEAD :], joint

    def _read(self, sums: list[float]) -> Said:
        share, loss, weight, fresh, moved, outdated, saturates, *rest = sums
        kinds, bits = rest[: len(_DTYPES)], rest[len(_DTYPES) :]
        met = [d for d, n in zip(_DTYPES, kinds, strict=True) if n]
        self._check(bits[:_BITS], _COLUMNS)
        self._check(bits[_BITS:], _PARAMETERS)
        return Said(
            weight=weight,
            loss=loss / share,
            is_fresh=fresh > 0,
            has_moved=moved > 0,
            is_outdated=outdated > 0,
            dtype=max(met, key=lambda d: torch.finfo(d).eps, default=None),
            saturates=saturates > 0,
        )

    def _check(self, bits: list[float], message: str) -> None:
        if any(n not in (0, self.size) for n in bits):
            raise ValueError(message.format(size=self.size))

    def _explain(self, own: BaseException | None) -> None:
        """Tell the others what went wrong here, or raise what went wrong there."""
        mine = None if own is None else (_kind_of(own), _text(own))
        theirs: list[Any] = [None] * self.size
        self._dist.all_gather_object(theirs, mine, group=self.group)
        if own is None:
            rank, found = next((i, t) for i, t in enumerate(theirs) if t is not None)
            kind = _KINDS[found[0]]
            raise kind(f"Rank {rank} of the process group: {found[1]}")

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is so on any rank."""
        number = torch.tensor(float(flag), dtype=torch.float32, device=device)
        self._dist.all_reduce(number, group=self.group)
        return bool(number > 0)


_HEAD = 1 + len(Said().numbers(1.0))
_COLUMNS = (
    "The {size} ranks multiply vectors that are not the same: a product is one of all "
    "ranks. Draw the vector from a generator with the same seed on each, or broadcast "
    "it; solvers need the same arguments, kinds of machine and numbers of threads."
)
_PARAMETERS = (
    "The parameters of the {size} ranks are not the same, so their losses have no mean "
    "with one Hessian. Broadcast the parameters from one rank (DistributedDataParallel "
    "does when it is made), or leave out process_group for this rank's own operator."
)


# As what an error of one rank is raised on the others, the first that it is.
_KINDS: tuple[type[Exception], ...] = (NotFiniteError, ValueError, RuntimeError)


def _kind_of(error: BaseException) -> int:
    is_one = (isinstance(error, kind) for kind in _KINDS[:-1])
    return next((i for i, it_is in enumerate(is_one) if it_is), len(_KINDS) - 1)


def _text(error: BaseException) -> str:
    text = str(error)
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def ranks_of(model: nn.Module, process_group: Any, shards: Any) -> Ranks | None:
    """The ranks that share the data: as asked for, or those that train the model.

    Raises:
        ValueError: for anything but None, "world" and a group of this process; for a
            mesh of several dimensions that is not the world.
    """
    dist: Any = sys.modules.get("torch.distributed")
    is_ready = dist is not None and dist.is_available() and dist.is_initialized()
    if process_group is not None:
        ranks = Ranks(find_group(process_group))
        _check_holders(ranks, shards)
        return ranks
    if not is_ready:
        return None
    if shards is not None:
        return Ranks(shards.group)
    groups = {id(m.process_group): m.process_group for m in replicas(model)}
    if len(groups) > 1:
        raise ValueError(
            f"The model has parts in {len(groups)} process groups. Pass "
            'process_group=, such as "world".'
        )
    return Ranks(*groups.values()) if groups else None


def _check_holders(ranks: Ranks, shards: Any) -> None:
    """ValueError if some of those that must put shards together are not asked."""
    sizes = [] if shards is None else [mesh.size() for mesh in shards.meshes]
    if any(size > ranks.size for size in sizes):
        raise ValueError(
            f"The parameters are sharded over {max(sizes)} ranks; process_group has "
            f"{ranks.size}. Pass the group of all ranks that hold a part of them."
        )
