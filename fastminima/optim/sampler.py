"""A batch sampler whose batch size can change between batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from ._checks import at_least

__all__ = ["BatchSizeSampler"]

Batch = TypeVar("Batch")
Last = Literal["keep", "drop", "carry"]
"""What `BatchSizeSampler` makes of the samples that an epoch has left over."""
# What has to be the same where a state is loaded; the rank does not.
_SETTINGS = ("n", "shuffle", "last", "num_replicas")


class BatchSizeSampler(Sampler[list[int]]):
    """Batches of indices whose size may change at any time, none lost or repeated.

    Give it to a `DataLoader` as `batch_sampler=`, and loop over `consumed(loader)`,
    which counts the batches that the loop receives (or call `step()` for each). An
    epoch is a permutation of the n samples, made from `(seed, epoch)`.

    **When a size acts.** `batch_size` is read when a batch is made. Without workers
    that is when the loop asks for it: the next batch has the new size. A DataLoader
    with workers makes num_workers * prefetch_factor batches ahead (4 for 2 workers),
    so the new size comes exactly that many batches late, or at the start of the next
    epoch if that is sooner. A size that `schedule` gives comes at its place in any
    case. `next_batch_size` is that of the batch the loop receives next.

    **Resuming.** The state says what was counted, not what was made, and the sizes of
    the batches made in between: iterating after `load_state_dict`, or after a `break`,
    goes on with the batch that the loop would have received, whatever the workers. With
    the same number of batches ahead later changes of size act at the same places too.
    As long as nothing was ever counted, each pass is an epoch of its own, as with the
    samplers of PyTorch.

    **Data parallel.** `batch_size` is that of each rank, to be set alike on all. A
    batch takes batch_size * num_replicas samples from the permutation, and of them
    each rank every num_replicas-th, so all ranks make equally many batches. The last
    one of `last="keep"` is filled up with up to num_replicas - 1 samples from the start
    of the epoch.

    `len()` is the number of batches in the epoch if the size stays what it is now. When
    the epoch is over it is that of the next one, which may differ with `last="carry"`.

    Args:
        n: number of samples in the data set.
        batch_size: samples in a batch; an attribute that can be set.
        seed: of the permutations, at least 0.
        shuffle: False takes the samples in their order.
        last: what becomes of the samples at the end of an epoch that are too few for a
            batch: "keep" makes a smaller batch, "drop" leaves them out, "carry" takes
            them into the first batch of the next epoch (where one may meet itself).
        schedule: a function from the number of samples in all batches before, those of
            all epochs and ranks, to the size of the next one; it replaces `batch_size`.
        num_replicas: number of ranks; None asks `torch.distributed`, where it runs.
        rank: of this process; None asks `torch.distributed`.

    Raises:
        ValueError: for a value out of range, a size larger than the data set with
            `last="drop"` or "carry", or setting a size that a schedule gives.

    Example:
        >>> import torch, fastminima as fm
        >>> sampler = fm.optim.BatchSizeSampler(10, 2, shuffle=False)
        >>> loader = torch.utils.data.DataLoader(range(10), batch_sampler=sampler)
        >>> for batch in sampler.consumed(loader):
        ...     print(batch.tolist())
        ...     sampler.batch_size = 5
        [0, 1]
        [2, 3, 4, 5, 6]
        [7, 8, 9]
        >>> sampler.epoch, sampler.samples_seen
        (1, 10)
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        last: Last = "keep",
        schedule: Callable[[int], int] | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        if last not in get_args(Last):
            raise ValueError(f"last must be one of {get_args(Last)}, got {last!r}.")
        is_parallel = dist.is_available() and dist.is_initialized()
        if num_replicas is None:
            num_replicas = dist.get_world_size() if is_parallel else 1
        if rank is None:
            rank = dist.get_rank() if is_parallel else 0
        self.n = at_least(1, "n", n)
        self.num_replicas = at_least(1, "num_replicas", num_replicas)
        self.rank = at_least(0, "rank", rank)
        self.seed = at_least(0, "seed", seed)
        if self.rank >= self.num_replicas:
            raise ValueError(
                f"rank must be below num_replicas, got {rank} and {num_replicas}."
            )
        if self.n < self.num_replicas:
            raise ValueError(
                f"{n} samples cannot be split over {num_replicas} ranks; each needs "
                "at least one."
            )
        self.shuffle = shuffle
        self.last: Last = last
        self.schedule = schedule
        self._batch_size = self._checked(batch_size)
        self._pass = 0
        self._is_counting = False
        self._samples_seen = 0
        self._begin(0)

    def __repr__(self) -> str:
        ranks = f", rank {self.rank} of {self.num_replicas}"
        return (
            f"BatchSizeSampler({self.n} samples, next batch {self.next_batch_size}"
            f"{ranks if self.num_replicas > 1 else ''}; epoch {self.epoch}, "
            f"{self.samples_seen} samples seen)"
        )

    @property
    def batch_size(self) -> int:
        """Size of the next batch that is made, on each rank."""
        if self.schedule is None:
            return self._batch_size
        return self._checked(self.schedule(self.samples_made))

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        if self.schedule is not None:
            raise ValueError(
                f"batch_size cannot be set to {value}: this sampler has a schedule "
                "that gives the sizes. Set schedule to None first."
            )
        self._batch_size = self._checked(value)

    @property
    def next_batch_size(self) -> int:
        """Size of the batch that the loop receives next, on each rank."""
        taken = self._pending[0] if self._pending else self._next_taken()
        # The epoch is over: the first batch of the next one.
        taken = taken or min(self.batch_size * self.num_replicas, self.n)
        return -(-taken // self.num_replicas)

    @property
    def epoch(self) -> int:
        """The epoch of the batch that the loop receives next."""
        return self._epoch + self._is_over()

    @property
    def samples_seen(self) -> int:
        """Samples in the batches that were counted, of all epochs and ranks."""
        return self._samples_seen

    @property
    def samples_made(self) -> int:
        """Samples in the batches that were made, those not counted yet included."""
        return self._samples_seen + sum(self._pending)

    def step(self) -> None:
        """Count one batch, as soon as the loop has received it.

        Raises:
            RuntimeError: if all batches that were made are counted.
        """
        if not self._pending:
            raise RuntimeError(
                "step() counts a batch that the loop has received, and all that were "
                "made are counted. Call it once for each batch, and not in a loop "
                "over consumed(loader), which calls it."
            )
        self._is_counting = True
        taken = self._pending.popleft()
        self._position += taken
        self._samples_seen += taken

    def consumed(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of a DataLoader with this sampler, each counted when received.

        A state saved in the body of the loop counts the batch of that body.

        Raises:
            ValueError: for a DataLoader that may change the order of the batches.
        """
        if not getattr(loader, "in_order", True):
            raise ValueError(
                "A DataLoader with in_order=False gives batches in another order than "
                "they were made in, so which ones the loop has received cannot be "
                "counted. Make it with in_order=True."
            )
        return self._counted(loader)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; in the midst of that epoch, stay there.

        Where batches are not counted, a pass that has ended, or that another epoch
        follows, is taken for consumed.
        """
        epoch = at_least(0, "epoch", epoch)
        is_left = self._is_ended or epoch != self._epoch
        if self._pending and not self._is_counting and is_left:
            self._consume()
            if epoch == self._epoch + 1:
                return self._advance()
        if not self._is_counting or epoch != self.epoch:
            self._begin(epoch)
        return None

    def state_dict(self) -> dict[str, Any]:
        """Where the loop is: the same on every rank, good for any of them.

        Raises:
            RuntimeError: if batches were made and none was ever counted.
        """
        if self._pending and not self._is_counting:
            raise RuntimeError(
                "Batches were made and none was counted, so where the loop is cannot "
                "be said. Iterate over consumed(loader), or call step() for each batch."
            )
        state = {name: getattr(self, name) for name in (*_SETTINGS, "seed")}
        state.update(
            batch_size=self._batch_size,
            samples_seen=self._samples_seen,
            epoch=self._epoch,
            position=self._position,
            carried=self._carried,
            pending=list(self._pending),
            is_ended=self._is_ended,
        )
        if not self._pending and (self._is_ended or not self._rest()):
            carried = self._rest() if self.last == "carry" else 0
            state.update(epoch=self._epoch + 1, position=0, carried=carried)
            state.update(is_ended=False)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the loop was that saved this state, from the next `iter` on.

        Raises:
            ValueError: for a state of a sampler with other settings.
        """
        for name in _SETTINGS:
            if state_dict[name] != getattr(self, name):
                raise ValueError(
                    f"The state is of a sampler with {name}={state_dict[name]!r}, and "
                    f"this one has {name}={getattr(self, name)!r}. Make it as that one."
                )
        self.seed = state_dict["seed"]
        self._batch_size = state_dict["batch_size"]
        self._samples_seen = state_dict["samples_seen"]
        self._begin(state_dict["epoch"], carried=state_dict["carried"])
        self._position = state_dict["position"]
        self._pending = deque(state_dict["pending"])
        self._is_ended = state_dict["is_ended"]
        self._is_counting = True

    def __iter__(self) -> Iterator[list[int]]:
        if self._pending and not self._is_counting:
            self._consume()
            self._advance()
        elif self._is_over():
            self._advance()
        self._pass += 1
        return self._batches(self._pass)

    def __len__(self) -> int:
        size = self.batch_size * self.num_replicas
        if self.last == "keep":
            return -(-self.n // size)
        return (self._carried_into_pass() + self.n) // size

    def _carried_into_pass(self) -> int:
        """Samples carried into the pass that is under way, or else comes next."""
        is_over = self._is_over() or (self._is_ended and not self._is_counting)
        return self._rest() if is_over and self.last == "carry" else self._carried

    def _counted(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        for batch in loader:
            self.step()
            yield batch

    def _consume(self) -> None:
        """Count all batches that were made."""
        taken = sum(self._pending)
        self._pending.clear()
        self._position += taken
        self._samples_seen += taken

    def _batches(self, number: int) -> Iterator[list[int]]:
        """The batches that wait for the loop, then new ones to the end of the epoch."""
        order = self._order()
        at = self._position
        waiting = tuple(self._pending)
        for taken in waiting:
            self._refuse_stale(number)
            yield self._part(order, at, taken)
            at += taken
        self._refuse_stale(number)
        while taken := self._next_taken():
            self._pending.append(taken)
            yield self._part(order, at, taken)
            at += taken
            self._refuse_stale(number)
        self._is_ended = True

    def _refuse_stale(self, number: int) -> None:
        if number != self._pass:
            raise RuntimeError(
                "This pass over the sampler is stale: a later one has begun, or a "
                "state was loaded. Iterate over the loader anew."
            )

    def _order(self) -> Tensor:
        """The samples of the epoch, after those carried from the one before."""
        now = self._permutation(self._epoch)
        if not self._carried:
            return now
        return torch.cat([self._permutation(self._epoch - 1)[-self._carried :], now])

    def _permutation(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.n, dtype=torch.int64, device="cpu")
        # Not seed + epoch: then one seed's epochs are the next seed's, one later.
        mixed = np.random.SeedSequence((self.seed, epoch)).generate_state(1)
        generator = torch.Generator("cpu").manual_seed(int(mixed[0]))
        return torch.randperm(self.n, generator=generator, device="cpu")

    def _part(self, order: Tensor, at: int, taken: int) -> list[int]:
        """This rank's share of a batch of all ranks."""
        batch = order[at : at + taken]
        if missing := -taken % self.num_replicas:
            batch = torch.cat([batch, order[:missing]])
        return batch[self.rank :: self.num_replicas].tolist()

    def _rest(self) -> int:
        """Samples of the epoch that no batch has yet."""
        return self._carried + self.n - self._position - sum(self._pending)

    def _next_taken(self) -> int:
        """How many samples the next batch takes on all ranks; 0 ends the epoch."""
        if self._is_ended:
            return 0
        rest, size = self._rest(), self.batch_size * self.num_replicas
        return size if rest >= size else rest if self.last == "keep" else 0

    def _is_over(self) -> bool:
        return not self._pending and self._next_taken() == 0

    def _advance(self) -> None:
        """Go to the next epoch, when all batches of this one are counted."""
        carries = self.last == "carry" and self._next_taken() == 0
        self._begin(self._epoch + 1, carried=self._rest() if carries else 0)

    def _begin(self, epoch: int, carried: int = 0) -> None:
        self._epoch = epoch
        self._carried = carried
        self._position = 0
        self._pending: deque[int] = deque()  # samples of each batch made, not counted
        self._is_ended = False
        self._pass += 1

    def _checked(self, batch_size: int) -> int:
        size = at_least(1, "batch_size", batch_size)
        if self.last != "keep" and size * self.num_replicas > self.n:
            raise ValueError(
                f"A batch of {size} samples on each of {self.num_replicas} ranks is "
                f"never full with {self.n} samples and last={self.last!r}. Use at "
                f'most {self.n // self.num_replicas}, or last="keep".'
            )
        return size
