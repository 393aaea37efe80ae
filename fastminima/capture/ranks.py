"""Statistics of the samples of all data-parallel ranks, with one collective a step.

Every rank sends one message: what happened, how many samples, and the numbers that
belong to single samples. The mean gradient itself need not travel: data-parallel
training has left the mean over ranks in `.grad`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._flat import dense_values
from ..ops import multi, reduce
from ..statistics import GradientStatistics
from .errors import CaptureError
from .graph.sharding import Sharding, is_sharded, local_part

__all__ = ["Alone", "Found", "Part", "Ranks"]

# Numbers at the head of a message.
_TROUBLE, _COUNT, _BATCH, _FACTOR, _REPLICATED, _SHARDED, _FIRST_NAME = range(7)
# Ranks that hold the same gradient agree on its norm to the last bit; so much is left
# to reductions that end differently on each rank.
_TOLERANCE = 1e-5
_BUCKET = 2**23  # elements of one all-reduce of vectors: 32 MiB in float32


class Found(NamedTuple):
    """What a pass of one rank brought, whose norms of `.grad` are not asked for yet.

    Attributes as of `Part`; on a GPU the factor may be there.
    """

    stats: GradientStatistics
    reached: Collection[str]
    factor: float | Tensor


@dataclass(frozen=True)
class Part:
    """What one rank brings.

    Attributes:
        stats: of its own samples; the mean gradient's norm is not read.
        reached: names of the parameters that its loss reached.
        factor: a sample's gradient is this times its part of the backward pass.
        grad_sq_norms: of `.grad` after the pass, of what this rank holds as a whole
            and of its pieces of sharded parameters; None with `keep_mean`.
        grad_sq_norms_by_parameter: parts of the same of single parameters, which add
            up over the ranks.
    """

    stats: GradientStatistics
    reached: Collection[str]
    factor: float
    grad_sq_norms: tuple[Tensor, Tensor] | None
    grad_sq_norms_by_parameter: Mapping[str, Tensor] = field(default_factory=dict)


class Alone:
    """One rank, with nobody to wait for: what is wrong is raised where it is found."""

    waits_for_others = False

    def found_earlier(self, owned: Mapping[str, Tensor]) -> ValueError | None:
        """Nothing: a pass is told from earlier ones."""
        return None

    def collect(
        self, finish: Callable[[], Found], owned: Mapping[str, Tensor]
    ) -> GradientStatistics:
        """The statistics of the samples."""
        return finish().stats


class Ranks:
    """The ranks of a process group that probe the same model.

    Args:
        group: the process group.
        parameters: the tracked parameters as the graph has them.
        directions: names of directions.
        per_parameter: whether norms of single parameters are sent.
        second_moments, keep_mean: whether vectors of parameter size are reduced too.
        sharding: of the parameters, if they are sharded.

    Raises:
        ValueError: on every rank, when the ranks' probes differ.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        parameters: Mapping[str, Tensor],
        directions: Sequence[str],
        *,
        per_parameter: bool,
        second_moments: bool,
        keep_mean: bool,
        sharding: Sharding | None,
    ) -> None:
        self.group, self.size = group, dist.get_world_size(group)
        self._shapes = {name: p.shape for name, p in parameters.items()}
        self._device = next(iter(parameters.values())).device
        self._directions = list(directions)
        self._per_parameter, self._keep_mean = per_parameter, keep_mean
        self._second_moments = second_moments
        self._sharding = sharding
        self._capacity = 0  # samples a message has room for: the most seen so far
        rows = 1 + len(directions) + (len(parameters) if per_parameter else 0)
        self._rows = rows
        self._first_square = _FIRST_NAME + len(parameters)
        squares = len(parameters) if per_parameter and not keep_mean else 0
        self._head = self._first_square + squares
        self._check_alike()

    waits_for_others = True

    def check_model(self, model: object) -> None:
        """See that the ranks that average gradients are those of the group.

        Raises:
            ValueError: when they are more or fewer.
        """
        modules = model.modules() if isinstance(model, nn.Module) else ()
        sizes = {
            dist.get_world_size(m.process_group)
            for m in modules
            if isinstance(m, nn.parallel.DistributedDataParallel)
        }
        if self._sharding is not None:
            sizes |= {mesh.size() for mesh in self._sharding.meshes}
        if not self._keep_mean and sizes - {self.size}:
            raise ValueError(
                f"The model's gradients are averaged over {sorted(sizes)} ranks, and "
                f"process_group has {self.size}. Pass the group of all ranks that "
                "train together, or keep_mean=True."
            )

    def found_earlier(self, owned: Mapping[str, Tensor]) -> ValueError | None:
        """What to say when `.grad` has gradients of passes before the coming one."""
        if self._keep_mean:
            return None
        names = [n for n, p in owned.items() if p.grad is not None and _any(p.grad)]
        if names or (self._sharding is not None and self._sharding.holds_gradients):
            what = repr(names[0]) if names else "the sharded parameters"
            return ValueError(
                f"Gradients of earlier backward passes are still there (of {what}), so "
                "what data-parallel training leaves in .grad is not the mean of this "
                "batch. Zero the gradients before each pass, or create the probe with "
                "keep_mean=True, which reduces the mean of each pass by itself."
            )
        return None

    def collect(
        self, finish: Callable[[], Found], owned: Mapping[str, Tensor]
    ) -> GradientStatistics:
        """The statistics of all ranks; every rank gets here, in trouble or not.

        Args:
            finish: ends the pass of this rank.
            owned: the parameters, which have the mean over ranks in `.grad`.

        Raises:
            CaptureError, ValueError: as `join`.
        """
        part = trouble = None
        try:
            found = finish()
            reached = frozenset(found.reached)
            grads = self.grad_sq_norms(owned, reached)
            each = self._each_sq_norm(owned)
            part = Part(found.stats, reached, float(found.factor), grads, each)
        except (CaptureError, ValueError) as error:
            trouble = error
        return self.join(part, trouble)

    def grad_sq_norms(
        self, owned: Mapping[str, Tensor], reached: Collection[str]
    ) -> tuple[Tensor, Tensor] | None:
        """Squared norms of `.grad`: of whole parameters, and of this rank's pieces.

        Raises:
            ValueError: when a parameter that the loss reached has no gradient.
        """
        if self._keep_mean:
            return None
        missing = [n for n, p in owned.items() if n in reached and p.grad is None]
        if missing:
            raise ValueError(
                f"There is no gradient in .grad of {missing[0]!r} after the backward "
                "pass: it was not reduced yet (set_requires_gradient_sync(False)), or "
                "something took it away (an optimizer that steps in backward, "
                "zero_grad() before collect()). Probe passes that reduce, collect "
                "right after them, or create the probe with keep_mean=True."
            )
        grads = [p.grad for p in owned.values() if p.grad is not None]
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        whole = [dense_values(g) for g in grads if not is_sharded(g)]
        pieces = zero
        for local, replicas in (local_part(g) for g in grads if is_sharded(g)):
            pieces = pieces + reduce.sq_norm(local).double() / replicas
        if not whole:
            return zero, pieces
        return multi.multi_sq_norm(whole), pieces

    def _each_sq_norm(self, owned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each parameter's |grad|^2, in parts that add up to it over the ranks."""
        if self._keep_mean or not self._per_parameter:
            return {}
        found: dict[str, Tensor] = {}
        for name, p in owned.items():
            if p.grad is not None and is_sharded(p.grad):
                local, replicas = local_part(p.grad)
                found[name] = reduce.sq_norm(local).double() / replicas
            elif p.grad is not None:
                square = multi.multi_sq_norm([dense_values(p.grad)])
                found[name] = square / self.size
        return found

    def join(
        self, part: Part | None, trouble: Exception | None = None
    ) -> GradientStatistics:
        """The statistics of all ranks' samples, in rank order, the same on each rank.

        Every rank calls it once a step, with its part or with what went wrong.

        Raises:
            CaptureError, ValueError: on every rank, when one of them is in trouble or
                the parts cannot be joined.
        """
        heads, body = self._exchange(part)
        head = heads.tolist()
        if any(h[_TROUBLE] for h in head):
            self._raise_together(trouble)
        assert part is not None
        counts = [int(h[_COUNT]) for h in head]
        total = sum(counts)
        batch = sum(int(h[_BATCH]) for h in head)  # samples behind the mean
        samples = torch.cat(
            [rows[:, :n] for rows, n in zip(body, counts, strict=True)], 1
        )
        samples = samples.to(part.stats.mean_grad_sq_norm.dtype)
        reached = [
            name
            for i, name in enumerate(self._shapes)
            if any(h[_FIRST_NAME + i] for h in head)
        ]
        by_parameter = dict(zip(self._shapes, samples[1:], strict=False))
        own = part.stats
        joint = replace(
            own,
            count=total,
            sq_norms=samples[0],
            sq_norms_by_parameter={name: by_parameter[name] for name in reached}
            if self._per_parameter
            else None,
            second_moments=self._mean(own.second_moments, reached, own.count / total),
            gram=None,
            dots=dict(
                zip(
                    self._directions,
                    samples[self._rows - len(self._directions) :],
                    strict=True,
                )
            ),
            mean_grad=self._mean(own.mean_grad, reached, own.all_count / batch),
            mean_count=None if batch == total else batch,
            samples=None,
        )
        return replace(
            joint,
            mean_grad_sq_norm=self._mean_sq_norm(joint, head),
            mean_grad_sq_norms_by_parameter=self._mean_sq_norms(joint, head, reached),
        )

    def _exchange(self, part: Part | None) -> tuple[Tensor, Tensor]:
        """Heads `[ranks, head]` and bodies `[ranks, rows, capacity]` of messages."""
        head = torch.zeros(self._head, dtype=torch.float64, device=self._device)
        rows = head.new_zeros(self._rows, 0)
        if part is None:
            head[_TROUBLE] = 1
        else:
            head[_COUNT], head[_BATCH] = part.stats.count, part.stats.all_count
            head[_FACTOR] = part.factor
            if part.grad_sq_norms is not None:
                head[_REPLICATED], head[_SHARDED] = part.grad_sq_norms
            was_reached = [float(name in part.reached) for name in self._shapes]
            head[_FIRST_NAME : self._first_square] = head.new_tensor(was_reached)
            for i, name in enumerate(self._shapes):
                if name in part.grad_sq_norms_by_parameter:
                    square = part.grad_sq_norms_by_parameter[name]
                    head[self._first_square + i] = square
            rows = self._numbers(part.stats)
        heads, body = self._gather(head, rows)
        most = int(heads[:, _COUNT].max())
        if most > self._capacity:  # on every rank: all have seen the same heads
            self._capacity = most
            heads, body = self._gather(head, rows)
        return heads, body

    def _gather(self, head: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        message = head.new_zeros(self._head + self._rows * self._capacity)
        message[: self._head] = head
        if rows.shape[1] <= self._capacity:
            room = message[self._head :].view(self._rows, self._capacity)
            room[:, : rows.shape[1]] = rows
        messages = [torch.empty_like(message) for _ in range(self.size)]
        dist.all_gather(messages, message, group=self.group)
        joined = torch.stack(messages)
        body = joined[:, self._head :].view(self.size, self._rows, self._capacity)
        return joined[:, : self._head].cpu(), body

    def _numbers(self, stats: GradientStatistics) -> Tensor:
        """What belongs to single samples, `[rows, count]`."""
        assert stats.sq_norms is not None
        rows = [stats.sq_norms]
        if self._per_parameter:
            known = stats.sq_norms_by_parameter or {}
            zero = torch.zeros_like(stats.sq_norms)
            rows += [known.get(name, zero) for name in self._shapes]
        rows += [stats.dots[name] for name in self._directions]
        return torch.stack(rows).double()

    def _mean_sq_norm(
        self, joint: GradientStatistics, head: Sequence[Sequence[float]]
    ) -> Tensor:
        like = joint.sq_norms
        assert like is not None
        if joint.mean_grad is not None:
            parts = [t.double().square().sum() for t in joint.mean_grad.values()]
            return torch.stack(parts).sum().to(like.dtype)
        self._check_weights(head)
        self._check_reduced(head)
        # .grad is the mean over ranks of sums over samples of g_n / factor.
        to_mean = head[0][_FACTOR] * self.size / joint.all_count
        total = head[0][_REPLICATED] + sum(h[_SHARDED] for h in head)
        return like.new_tensor(total * to_mean**2)

    def _mean_sq_norms(
        self,
        joint: GradientStatistics,
        head: Sequence[Sequence[float]],
        reached: Sequence[str],
    ) -> dict[str, Tensor] | None:
        """The same by parameter."""
        like = joint.sq_norms
        if not self._per_parameter or like is None:
            return None
        if joint.mean_grad is not None:
            squares = {n: t.double().square() for n, t in joint.mean_grad.items()}
            return {name: t.sum().to(like.dtype) for name, t in squares.items()}
        to_mean = head[0][_FACTOR] * self.size / joint.all_count
        squares = [sum(at) for at in zip(*head, strict=True)][self._first_square :]
        totals = dict(zip(self._shapes, squares, strict=True))
        return {name: like.new_tensor(totals[name] * to_mean**2) for name in reached}

    def _check_weights(self, head: Sequence[Sequence[float]]) -> None:
        if len({h[_FACTOR] for h in head}) == 1:
            return
        counts = [int(h[_BATCH]) for h in head]
        raise ValueError(
            f"The ranks' samples weigh differently in .grad, which is the mean of the "
            f"ranks' means: the ranks have {counts} samples. Give every rank as many "
            "(drop_last=True in the loader), use the sum over samples as loss "
            '(reduction="sum"), or create the probe with keep_mean=True, which weighs '
            "the samples alike."
        )

    def _check_reduced(self, head: Sequence[Sequence[float]]) -> None:
        norms = [h[_REPLICATED] for h in head]
        finite = [math.isfinite(norm) for norm in norms]
        is_same = not any(finite) or (
            all(finite) and max(norms) - min(norms) <= _TOLERANCE * max(norms)
        )
        if not is_same:
            raise ValueError(
                f"The ranks hold different gradients (of squared norms {norms}), "
                "so .grad is not the mean over the ranks. Wrap the model in "
                "DistributedDataParallel and probe passes outside of no_sync(); or "
                "create the probe with keep_mean=True, which reduces the mean itself."
            )

    def _mean(
        self,
        own: Mapping[str, Tensor] | None,
        reached: Sequence[str],
        weight: float,
    ) -> dict[str, Tensor] | None:
        """Means over the samples of all ranks of vectors that every rank has whole."""
        if own is None:
            return None
        zero = next(iter(own.values()))
        found: dict[str, Tensor] = {}
        for names in _buckets(reached, self._shapes):
            flat = [
                (own[name] * weight).flatten()
                if name in own
                else zero.new_zeros(self._shapes[name].numel())
                for name in names
            ]
            bucket = torch.cat(flat)
            dist.all_reduce(bucket, group=self.group)
            pieces = bucket.split([len(t) for t in flat])
            for name, piece in zip(names, pieces, strict=True):
                found[name] = piece.view(self._shapes[name])
        return found

    def _raise_together(self, trouble: Exception | None) -> None:
        mine = None
        if trouble is not None:
            mine = isinstance(trouble, ValueError), str(trouble)
        theirs: list[tuple[bool, str] | None] = [None] * self.size
        dist.all_gather_object(theirs, mine, group=self.group)
        if trouble is not None:
            raise trouble
        rank, found = next((i, t) for i, t in enumerate(theirs) if t is not None)
        kind = ValueError if found[0] else CaptureError
        raise kind(f"Rank {rank} of the probe's process group: {found[1]}")

    def _check_alike(self) -> None:
        mine = (
            [(name, tuple(shape)) for name, shape in self._shapes.items()],
            *(self._directions, self._per_parameter),
            *(self._second_moments, self._keep_mean),
        )
        theirs: list[object] = [None] * self.size
        dist.all_gather_object(theirs, mine, group=self.group)
        different = [rank for rank, other in enumerate(theirs) if other != theirs[0]]
        if different:
            raise ValueError(
                f"The probes of ranks 0 and {different[0]} differ in their parameters, "
                "directions or options; create the same probe on every rank of "
                "process_group."
            )


def _buckets(names: Sequence[str], shapes: Mapping[str, torch.Size]) -> list[list[str]]:
    buckets: list[list[str]] = []
    room = 0
    for name in names:
        size = shapes[name].numel()
        if not buckets or size > room:
            buckets.append([])
            room = _BUCKET
        buckets[-1].append(name)
        room -= size
    return buckets


def _any(grad: Tensor) -> bool:
    if is_sharded(grad):
        return bool(local_part(grad)[0].any())
    return bool(dense_values(grad).any())
