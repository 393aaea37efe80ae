"""Cycles the ratio of learning rate to batch size through either of the two."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from .sampler import BatchSizeSampler

__all__ = ["CyclicRatio"]

Vary = Literal["lr", "batch_size"]
"""What `CyclicRatio` moves."""
Shape = Literal["square", "triangle"]
"""The wave of a `CyclicRatio`."""
First = Literal["low", "high"]
"""Where a `CyclicRatio` begins."""
# What has to be the same where a state is loaded.
_SETTINGS = ("vary", "shape", "first", "low", "high", "period", "batch_size")


class CyclicRatio(LRScheduler):
    """Moves eta / S between two values, by the learning rate or by the batch size.

    The ratio is a function of the number of samples that the loop has seen, not of
    steps: a step of a larger batch is a longer one. With `vary="lr"` the learning rate
    is ratio * S for the size S of the batch that comes next, a short last one included;
    with `vary="batch_size"` S is round(eta / ratio), at least 1, for the learning rate
    eta that the optimizer began with. The two cycles have the same ratio at the same
    sample, which is what the paper compares.

    Call `step()` once after each `optimizer.step()`, with its batch counted by the
    sampler; it sets what holds for the next batch. A batch has the ratio of the place
    in the cycle where it begins, so a phase of a square wave is period / 2 samples
    long, up to one batch. Sizes act at their place also when the workers of a
    DataLoader make batches ahead, since the schedule becomes that of the sampler.

    The schedule owns the learning rates: those of the first group as above, those of
    others in the proportion to it that they had when the schedule was made. S is the
    size over all ranks. Under gradient accumulation over k batches, give ratios k times
    as large with `vary="lr"`, and S stays that of one batch.

    With momentum m the ratio that counts is eta / ((1 - m) S), and a velocity in units
    of the gradient carries the former rate on for some 1 / (1 - m) steps after a jump.

    Args:
        optimizer: its learning rates are set, or with `vary="batch_size"` kept.
        sampler: of the batches; None, only with `vary="lr"`, for batches that all have
            `batch_size` samples.
        low: the smaller ratio, above 0.
        high: the larger ratio.
        period: length of a cycle, in samples seen (n times the epochs).
        vary: what moves.
        shape: "square" holds each ratio for half a period; "triangle" moves the ratio
            linearly from one to the other and back.
        first: where the cycle begins: "low" is the safer start of a training.
        batch_size: samples in a batch over all ranks, where there is no sampler.

    Attributes:
        ratio: the wanted eta / S for the next batch.
        realised_ratio: eta / S for the next batch as it is, S being an integer.
        samples_seen: samples when `step()` was last called.

    Raises:
        ValueError: for a value out of range, a learning rate of 0, or a size that the
            sampler refuses.
        RuntimeError: from `step()`, if the sampler has counted no batch since the last.

    Example:
        >>> import torch, fastminima as fm
        >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> sampler = fm.optim.BatchSizeSampler(12, 2)
        >>> cycle = fm.optim.CyclicRatio(sgd, sampler, low=0.01, high=0.05, period=12)
        >>> for batch in sampler.consumed(sampler):
        ...     print(cycle.samples_seen, len(batch), round(cycle.get_last_lr()[0], 6))
        ...     sgd.step()
        ...     cycle.step()
        0 2 0.02
        2 2 0.02
        4 2 0.02
        6 2 0.1
        8 2 0.1
        10 2 0.1

    Source: Jastrzebski et al. (2017), arXiv:1711.04623 (cycles of batch size and of
    learning rate are exchangeable); Smith (2017), arXiv:1506.01186 (triangles).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        sampler: BatchSizeSampler | None,
        low: float,
        high: float,
        period: float,
        vary: Vary = "lr",
        shape: Shape = "square",
        *,
        first: First = "low",
        batch_size: int | None = None,
    ) -> None:
        _check_choice("vary", vary, get_args(Vary))
        _check_choice("shape", shape, get_args(Shape))
        _check_choice("first", first, get_args(First))
        if not 0 < low <= high < math.inf:
            raise ValueError(
                f"The ratios need 0 < low <= high < inf, got low={low} and high={high}."
            )
        if not 0 < period < math.inf:
            raise ValueError(
                f"period must be above 0 samples and finite, got {period}."
            )
        _check_source(sampler, batch_size, vary)
        self.low, self.high, self.period = low, high, period
        self.vary, self.shape, self.first = vary, shape, first
        self.sampler = sampler
        self.batch_size = batch_size
        self.samples_seen = 0 if sampler is None else sampler.samples_seen
        self.ratio = self.realised_ratio = self.ratio_at(self.samples_seen)
        super().__init__(optimizer)

    def __repr__(self) -> str:
        return (
            f"CyclicRatio({self.low:g} to {self.high:g} in {self.period:g} samples by "
            f"{self.vary}, {self.shape}; ratio {self.realised_ratio:.4g} after "
            f"{self.samples_seen} samples)"
        )

    def ratio_at(self, samples: float) -> float:
        """The wanted eta / S after this many samples."""
        place = samples % self.period
        if self.shape == "square":
            height = 0.0 if 2 * place < self.period else 1.0
        else:
            height = 1 - abs(2 * place / self.period - 1)
        if self.first == "high":
            height = 1 - height
        # So that both ends are exact.
        return self.low * (1 - height) + self.high * height

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates for the next batch; `step` calls it."""
        if self.last_epoch == 0:
            self._start()
        else:
            self._count()
        self.ratio = self.ratio_at(self.samples_seen)
        size = self._next_size()
        base = [float(rate) for rate in self.base_lrs]
        rate = self.ratio * size if self.vary == "lr" else base[0]
        self.realised_ratio = rate / size
        if self.vary == "batch_size":
            return [*base]
        return [rate, *(rate * (other / base[0]) for other in base[1:])]

    def state_dict(self) -> dict[str, Any]:
        """The usual state; the sampler has one of its own."""
        return {k: v for k, v in super().state_dict().items() if k != "sampler"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, and the learning rates with it.

        Raises:
            ValueError: for a state of another cycle.
        """
        for name in _SETTINGS:
            mine, saved = getattr(self, name), state_dict.get(name)
            if saved != mine:
                raise ValueError(
                    f"The state is of a schedule with {name}={saved!r}, and this one "
                    f"has {name}={mine!r}. Make it as that one, or start a new cycle "
                    "without loading."
                )
        super().load_state_dict(state_dict)
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(float(rate))
            else:
                group["lr"] = rate

    def _start(self) -> None:
        """Check what the first batch needs, and give the sampler its sizes."""
        rate = float(self.base_lrs[0])
        if not rate > 0:
            raise ValueError(
                "The learning rate of the first group must be above 0, since those of "
                f"the others are set in proportion to it; got {rate}."
            )
        if self.vary == "batch_size" and self.sampler is not None:
            for ratio in (self.low, self.high):
                self.sampler.batch_size = self._size_for(ratio)
            self.sampler.schedule = self._size_at

    def _count(self) -> None:
        """Take in the batches since the last step."""
        if self.sampler is None:
            assert self.batch_size is not None
            self.samples_seen += self.batch_size
            return
        if self.sampler.samples_seen <= self.samples_seen:
            raise RuntimeError(
                f"The sampler has counted {self.sampler.samples_seen} samples, no more "
                "than at the last step() of the schedule. Iterate over "
                "sampler.consumed(loader), or call sampler.step() for each batch, "
                "before step(); and load the states of both."
            )
        self.samples_seen = self.sampler.samples_seen

    def _next_size(self) -> int:
        """Samples in the next batch, over all ranks."""
        if self.sampler is None:
            assert self.batch_size is not None
            return self.batch_size
        return self.sampler.next_batch_size * self.sampler.num_replicas

    def _size_at(self, samples: int) -> int:
        return self._size_for(self.ratio_at(samples))

    def _size_for(self, ratio: float) -> int:
        """Samples in a batch of each rank, closest to a ratio."""
        assert self.sampler is not None
        size = float(self.base_lrs[0]) / ratio / self.sampler.num_replicas
        return max(1, round(size))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.")


def _check_source(
    sampler: BatchSizeSampler | None, batch_size: int | None, vary: Vary
) -> None:
    """Exactly one of sampler and batch size says what S is."""
    if sampler is None and vary == "batch_size":
        raise ValueError(
            'vary="batch_size" needs a sampler whose size it can change, got None. '
            "Give a BatchSizeSampler."
        )
    if (sampler is None) == (batch_size is None):
        given = "neither" if sampler is None else "both"
        raise ValueError(
            f"The batch size is that of the sampler or batch_size=, got {given}. Give "
            "one of them."
        )
    if sampler is not None and not isinstance(sampler, BatchSizeSampler):
        raise ValueError(
            f"The sampler must be a BatchSizeSampler, got a {type(sampler).__name__}. "
            "With one whose size does not change, give None and batch_size=."
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
