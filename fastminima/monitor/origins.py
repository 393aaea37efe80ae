"""Where the samples of a step come from: their ids, ranks and batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..statistics import GradientStatistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Origin", "gather_origin", "own_origin"]


@dataclass(frozen=True)
class Origin:
    """Where the samples of some statistics came from.

    Attributes:
        ids: what identifies each sample of this process; its index where that is None.
        microbatches: sizes of the batches that make up the step, over all ranks.
        ranks: processes whose samples are in each batch, one after the other.
        counts: samples of each rank in each batch, `[batches][ranks]`; where it is
            empty, all ranks have as many, and None where nothing is known.
        members: numbers of these processes; where it is empty, they are all there are.
        others: ids of samples of other processes, as far as they are known, by their
            place among all samples.
        group: those to ask for them, where there are ids.
    """

    ids: Sequence[Any] | None = None
    microbatches: Sequence[int] = ()
    ranks: int = 1
    counts: Sequence[Sequence[int]] | None = ()
    members: Sequence[int] = ()
    others: Mapping[int, Any] = field(default_factory=dict)
    group: ProcessGroup | None = None

    def of(self, number: int) -> dict[str, Any]:
        """Id, index within its batch, rank and batch of a sample.

        Where the id is not known it is the index. Where ranks may have had different
        numbers of samples, the rank is None and the index that among all of them.
        """
        microbatch, rank, index = self._place(number)
        found = self.others.get(number, self._own_id(number))
        found = index if found is None else _plain(found)
        return {"id": found, "index": index, "rank": rank, "microbatch": microbatch}

    def told_by_all(self, numbers: Sequence[int]) -> Origin:
        """The same with the ids of these samples, whose ranks say them.

        Where there is a group it is a collective call.
        """
        if self.group is None:
            return self
        own = {number: self._own_id(number) for number in numbers}
        mine = {number: _plain(one) for number, one in own.items() if one is not None}
        theirs: list[Any] = [None] * self.ranks
        dist.all_gather_object(theirs, mine, group=self.group)
        others = {number: one for of in theirs for number, one in of.items()}
        return replace(self, others=others)

    def _place(self, number: int) -> tuple[int, int | None, int]:
        """Batch and rank of a sample, and its index there."""
        microbatch, index = _located(number, self.microbatches)
        shares = self._shares(microbatch)
        if shares is None:
            return microbatch, None, index
        rank, index = _located(index, shares)
        return microbatch, self._members()[rank], index

    def _own_id(self, number: int) -> Any:
        """What this process calls a sample; None if it is not one of its own."""
        microbatch, rank, index = self._place(number)
        if self.ids is None or rank != _own_rank():
            return None
        at = self._members().index(rank)
        before = [self._shares(earlier) for earlier in range(microbatch)]
        place = index + sum(shares[at] for shares in before if shares is not None)
        return self.ids[place] if None not in before and place < len(self.ids) else None

    def _members(self) -> Sequence[int]:
        if self.members:
            return self.members
        return (_own_rank(),) if self.ranks == 1 else range(self.ranks)

    def _shares(self, microbatch: int) -> Sequence[int] | None:
        """Samples of each rank in a batch; None where that is not known."""
        if self.counts is None:
            return None
        if self.counts:
            return self.counts[microbatch]
        if not self.microbatches:
            return (0,)  # of one rank, in one batch: nothing to look for
        each, rest = divmod(self.microbatches[microbatch], self.ranks)
        return None if rest else (each,) * self.ranks


def own_origin(
    stats: GradientStatistics | None,
    ids: Sequence[Any] | None,
    microbatches: Sequence[int],
    ranks: int,
) -> Origin:
    """The origin of the samples of a row, as far as this process knows it."""
    if stats is None:
        return Origin()
    if stats.samples is None and stats.count < stats.all_count:
        return Origin(None, [stats.count], ranks, counts=None)
    if ranks > 1:
        microbatches = microbatches or [stats.all_count]
    return Origin(ids, microbatches, ranks)


def gather_origin(
    ids: Sequence[Any] | None,
    sizes: Sequence[int],
    stats: GradientStatistics,
    loss: float | Tensor | None,
    group: ProcessGroup,
) -> tuple[Origin, float | Tensor | None]:
    """The origin of the samples of all ranks, and their losses or the mean of these.

    Collective calls of a few integers and, where there is a loss, of its numbers.

    Args:
        ids: of the samples of this process, or None.
        sizes: of its own batches, as many as the other ranks have.
        stats: of the samples of all ranks.
        loss: of its own samples, or the mean of these; None on all ranks or none.
        group: the ranks.

    Raises:
        ValueError: without sizes; on all ranks, where one has other numbers of batches
            or no loss.
    """
    if not sizes:
        raise ValueError(
            "With process_group a row needs microbatches, the sizes of this process' "
            "batches: microbatches=[len(losses)]."
        )
    device = stats.mean_grad_sq_norm.device
    has_ids = ids is not None and any(one is not None for one in ids)
    has_losses = isinstance(loss, Tensor) and loss.shape == (sum(sizes),)
    told = (len(sizes), sum(sizes), has_ids, loss is not None, has_losses)
    mine = torch.tensor(told, dtype=torch.int64, device=device)
    batches, sums, said, have, known = _gathered(mine, group).T.tolist()  # each [ranks]
    _check_alike(batches, have)
    counts = [sums]
    if len(sizes) > 1:
        mine = torch.tensor(sizes, dtype=torch.int64, device=device)
        counts = _gathered(mine, group).T.tolist()
    is_all = sum(sums) == stats.count  # else some were not looked at
    if loss is not None:
        loss = torch.as_tensor(loss, dtype=torch.float64, device=device).detach()
        if is_all and all(known):
            loss = _gathered_losses(loss, counts, group)
        else:
            whole = torch.stack([loss.mean() * sum(sizes), loss.new_tensor(sum(sizes))])
            total, samples = _gathered(whole, group).sum(0)
            loss = total / samples
    if not is_all:
        return Origin(ids, [stats.count], len(said), counts=None), loss
    origin = Origin(
        *(ids, [sum(shares) for shares in counts], len(said), counts),
        members=tuple(dist.get_process_group_ranks(group)),
        group=group if any(said) else None,
    )
    return origin, loss


def _check_alike(batches: Sequence[int], have: Sequence[int]) -> None:
    """Raise on all ranks what would leave some of them waiting for others."""
    if len(set(batches)) > 1:
        raise ValueError(
            f"The ranks have different numbers of batches in this row: {batches}. Give "
            "each rank's microbatches, as many as it had backward passes."
        )
    if len(set(have)) > 1:
        raise ValueError(
            "Some ranks gave a loss for this row and others none. Pass loss= on all "
            "ranks, or on none."
        )


def _gathered(mine: Tensor, group: ProcessGroup) -> Tensor:
    """`[ranks, ...]` of what is as large on each."""
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(theirs, mine, group=group)
    return torch.stack(theirs)


def _gathered_losses(
    losses: Tensor, counts: Sequence[Sequence[int]], group: ProcessGroup
) -> Tensor:
    """Losses of all samples, in the order of the statistics: by batch, then by rank."""
    of_ranks = list(zip(*counts, strict=True))  # [ranks][batches]
    padded = losses.new_zeros(max(map(sum, of_ranks)))
    padded[: len(losses)] = losses
    pieces = [
        row[: sum(shares)].split(list(shares))
        for row, shares in zip(_gathered(padded, group), of_ranks, strict=True)
    ]
    return torch.cat([piece for batch in zip(*pieces, strict=True) for piece in batch])


def _located(number: int, sizes: Sequence[int]) -> tuple[int, int]:
    """In which of several pieces one after the other a number is, and where there."""
    which = 0
    for size in sizes[:-1]:
        if number < size:
            break
        number, which = number - size, which + 1
    return which, number


def _plain(one: Any) -> Any:
    """An id as JSON can have it: the numbers of a tensor."""
    if isinstance(one, (tuple, list)):
        return tuple(map(_plain, one))
    tolist = getattr(one, "tolist", None)  # of tensors and arrays
    return tolist() if callable(tolist) else one


def _own_rank() -> int:
    is_one_of_many = dist.is_available() and dist.is_initialized()
    return dist.get_rank() if is_one_of_many else 0
