"""Lets the batch size follow the measured noise scale."""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from ._checks import check_range
from .sampler import BatchSizeSampler

__all__ = ["NoiseScaleBatchSize"]

ScaleLr = Literal["none", "linear", "sqrt"]
"""How `NoiseScaleBatchSize` moves the learning rate with the batch size."""
_EXPONENT = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}
_STATE = ("_updates", "_noise", "_signal", "_seen", "_epoch", "_due")


@runtime_checkable
class _Statistics(Protocol):
    """`GradientStatistics`, `MinibatchVariance`, or what else has these two."""

    @property
    def covariance_trace(self) -> Tensor: ...
    @property
    def signal(self) -> Tensor: ...


class NoiseScaleBatchSize:
    """Sets a sampler's batch size to the noise scale tr Sigma / |E g|^2.

    Numerator and denominator are averaged apart, exponentially over the updates, with
    the bias of their start at zero taken out; their ratio is the batch size at which
    gradient noise and signal have equal power. The size changes at the ends of epochs,
    or `every` so many samples, by at most a factor of `factor` (or by one sample of
    each rank, where that is more), and not for a change below `hysteresis`. As long as
    the average of |E g|^2, of which each estimate may be negative, is not above 0, the
    noise scale is unknown and the size stays; but one that is not between `min_size`
    and `max_size` moves there, a factor at a time.

    A changed size changes the ratio eta / S, which decides how noisy SGD is.
    `scale_lr="linear"` keeps the ratio by moving the learning rate along; "sqrt" keeps
    eta^2 / S, the variance of a step; "none" leaves the learning rate alone and lets
    the ratio fall as the batch grows. The rate changes with the first batch of the new
    size, which with DataLoader workers comes some batches later (`BatchSizeSampler`).
    A scheduler that sets rates of its own undoes it.

    Call `update` once after each step, its batch counted by the sampler, with
    statistics where there are any. Sizes are over all ranks, each of which must be
    given the same statistics, and multiples of their number (but for a short batch).

    Args:
        sampler: its `batch_size` is set.
        every: samples between two decisions; None decides at the ends of epochs.
        smoothing: weight of the past in the averages: 0.95 looks back over some 20
            updates.
        min_size: smallest batch, at least 2: a single sample has no variance, so that
            the noise scale of batches of 1 would never be known again.
        max_size: largest batch; None is the whole data set.
        factor: largest change at once, up or down.
        hysteresis: relative change below which the size stays.
        scale_lr: how the learning rates of `optimizer` follow.
        optimizer: needed for `scale_lr="linear"` and "sqrt".

    Raises:
        ValueError: for a value out of range, a sampler with a schedule, or learning
            rates to scale without an optimizer.
        RuntimeError: from `update()`, if the sampler has counted no batch since the
            last.

    Example:
        >>> import torch, fastminima as fm
        >>> from types import SimpleNamespace
        >>> sampler = fm.optim.BatchSizeSampler(100, 10)
        >>> following = fm.optim.NoiseScaleBatchSize(sampler, every=20)
        >>> stats = SimpleNamespace(covariance_trace=90.0, signal=6.0)
        >>> for batch in sampler.consumed(sampler):
        ...     print(len(batch), round(following.noise_scale, 3))
        ...     following.update(stats)
        10 nan
        10 15.0
        15 15.0
        15 15.0
        15 15.0
        15 15.0
        15 15.0
        5 15.0

    Source: McCandlish et al. (2018), arXiv:1812.06162, "simple noise scale" and
    appendix A.1 (separate averages); factor and hysteresis are ours.
    """

    def __init__(
        self,
        sampler: BatchSizeSampler,
        *,
        every: int | None = None,
        smoothing: float = 0.95,
        min_size: int = 2,
        max_size: int | None = None,
        factor: float = 2.0,
        hysteresis: float = 0.1,
        scale_lr: ScaleLr = "none",
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        ranks = sampler.num_replicas
        largest = sampler.n if sampler.last == "keep" else sampler.n // ranks * ranks
        max_size = largest if max_size is None else max_size
        check_range("every", 1 if every is None else every, 1)
        check_range("smoothing", smoothing, 0, below=1)
        check_range("hysteresis", hysteresis, 0)
        if not factor > 1:
            raise ValueError(f"factor must be above 1, got {factor}.")
        if not 2 <= min_size <= max_size <= largest:
            raise ValueError(
                f"The sizes need 2 <= min_size <= max_size <= {largest}, got "
                f"min_size={min_size} and max_size={max_size}."
            )
        # On each rank.
        self._lowest, self._highest = math.ceil(min_size / ranks), max_size // ranks
        if self._lowest > self._highest:
            raise ValueError(
                f"A batch of all ranks is a multiple of num_replicas={ranks}, and none "
                f"lies between min_size={min_size} and max_size={max_size}."
            )
        if scale_lr not in get_args(ScaleLr):
            raise ValueError(
                f"scale_lr must be one of {get_args(ScaleLr)}, got {scale_lr!r}."
            )
        if scale_lr != "none" and optimizer is None:
            raise ValueError(
                f"scale_lr={scale_lr!r} needs the optimizer whose learning rates "
                "follow the size. Give optimizer=."
            )
        if sampler.schedule is not None:
            raise ValueError(
                "The sampler has a schedule that gives its sizes, and only one can. "
                "Make it without schedule= and without CyclicRatio on it."
            )
        self.sampler = sampler
        self.every = every
        self.smoothing = smoothing
        self.min_size, self.max_size = min_size, max_size
        self.factor, self.hysteresis = factor, hysteresis
        self.scale_lr: ScaleLr = scale_lr
        self.optimizer = optimizer
        self._updates = 0
        self._noise = self._signal = 0.0
        self._seen = sampler.samples_seen
        self._epoch = sampler.epoch
        # (samples made when the size changed, factor of the learning rates)
        self._due: list[tuple[int, float]] = []

    @property
    def covariance_trace(self) -> float:
        """Running average of tr Sigma; NaN before the first update."""
        return self._noise / self._weight if self._updates else math.nan

    @property
    def signal(self) -> float:
        """Running average of |E g|^2; NaN before the first update."""
        return self._signal / self._weight if self._updates else math.nan

    @property
    def noise_scale(self) -> float:
        """Ratio of the averages, in samples; NaN while the signal is not above 0."""
        signal = self.signal
        return self.covariance_trace / signal if signal > 0 else math.nan

    def update(self, stats: _Statistics | None = None) -> None:
        """Take in a step's statistics, and change the size when it is time to.

        Statistics that are not finite are left out, as are those of a single sample.

        Raises:
            RuntimeError: if the sampler has counted no batch since the last update.

        Args:
            stats: `GradientStatistics`, `MinibatchVariance`, or None where a step has
                none.
        """
        if self.sampler.samples_seen <= self._seen:
            raise RuntimeError(
                f"The sampler has counted {self.sampler.samples_seen} samples, no more "
                "than at the last update(). Iterate over sampler.consumed(loader), or "
                "call sampler.step() for each batch, before update(); and load the "
                "states of both."
            )
        if stats is not None and getattr(stats, "count", 2) > 1:
            self._average(float(stats.covariance_trace), float(stats.signal))
        if self._is_time():
            self._change()
        while self._due and self._due[0][0] <= self.sampler.samples_seen:
            self._scale_rates(self._due.pop(0)[1])

    def __repr__(self) -> str:
        return (
            f"NoiseScaleBatchSize(batch size {self._size} in [{self.min_size}, "
            f"{self.max_size}]; noise_scale {self.noise_scale:.4g} from "
            f"{self._updates} updates)"
        )

    def to_dict(self) -> dict[str, float]:
        """Size, learning rate and averages, for a log line."""
        row: dict[str, float] = {"batch_size": self._size}
        if self.optimizer is not None:
            rate = float(self.optimizer.param_groups[0]["lr"])
            row |= {"learning_rate": rate, "ratio": rate / self._size}
        row |= {"covariance_trace": self.covariance_trace, "signal": self.signal}
        return row | {"noise_scale": self.noise_scale}

    def state_dict(self) -> dict[str, Any]:
        """Averages and changes to come; sampler and optimizer have their own."""
        state = {name.removeprefix("_"): getattr(self, name) for name in _STATE}
        return state | {"due": list(self._due)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""
        for name in _STATE:
            setattr(self, name, state_dict[name.removeprefix("_")])
        self._due = list(self._due)

    @property
    def _weight(self) -> float:
        """What the averages sum up to, having begun at zero."""
        return 1 - self.smoothing**self._updates

    @property
    def _size(self) -> int:
        """Samples in a batch, over all ranks."""
        return self.sampler.batch_size * self.sampler.num_replicas

    def _average(self, noise: float, signal: float) -> None:
        if math.isfinite(noise) and math.isfinite(signal):
            past = self.smoothing
            self._noise = past * self._noise + (1 - past) * noise
            self._signal = past * self._signal + (1 - past) * signal
            self._updates += 1

    def _is_time(self) -> bool:
        before, self._seen = self._seen, self.sampler.samples_seen
        epoch, self._epoch = self._epoch, self.sampler.epoch
        if self.every is None:
            return self._epoch > epoch
        return self._seen // self.every > before // self.every

    def _change(self) -> None:
        """Move the size towards the noise scale, if that is known and far enough."""
        old, ranks = self._size, self.sampler.num_replicas
        wanted = old if math.isnan(self.noise_scale) else self.noise_scale
        wanted = min(max(wanted, self._lowest * ranks), self._highest * ranks)
        is_allowed = self._lowest <= self.sampler.batch_size <= self._highest
        if is_allowed and abs(wanted / old - 1) < self.hysteresis:
            return
        self.sampler.batch_size = self._within_reach(round(wanted / ranks))
        if self._size != old:
            growth = (self._size / old) ** _EXPONENT[self.scale_lr]
            self._due.append((self.sampler.samples_made, growth))

    def _within_reach(self, size: int) -> int:
        """The size of a rank's batch that one change may lead to, closest to `size`."""
        old = self.sampler.batch_size
        least = min(math.ceil(old / self.factor), old - 1)
        most = max(math.floor(min(old * self.factor, self._highest)), old + 1)
        return min(max(size, least), most)

    def _scale_rates(self, growth: float) -> None:
        if self.optimizer is None or growth == 1:
            return
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].mul_(growth)
            else:
                group["lr"] *= growth
