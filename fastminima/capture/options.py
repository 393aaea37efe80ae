"""What users say of a probe, of a loss and of directions, checked once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .errors import CaptureError
from .graph.summed import warn_if_summed
from .rows.samples import Batch, Samples, Segments

__all__ = [
    "REDUCTIONS",
    "BatchNorm",
    "Measure",
    "Mode",
    "Options",
    "Reduction",
    "Request",
    "Target",
    "check_adds_up",
    "check_dim",
    "check_direction",
    "check_word",
    "positive",
]

Measure = Literal["norms", "second_moments", "gram"]
"""What `GradientProbe` keeps of each sample: its `measure`."""
Mode = Literal["observe", "fused"]
"""How `GradientProbe` reads gradients: its `mode`."""
BatchNorm = Literal["error", "rows", "frozen"]
"""What `GradientProbe` makes of batch normalisation in training mode."""
Reduction = Literal["mean", "sum"]
"""What a scalar loss is of its samples' losses."""
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


_USUAL: dict[str, Any] = {
    "per_parameter": False,
    "keep_mean": False,
    "mode": "observe",
    "batchnorm": "error",
    "batch_dim": 0,
    "every": 1,
    "accumulate": 1,
    "sample": None,
    "check_every": 200,
}


@dataclass(frozen=True)
class Options:
    """What a probe was told when it was made.

    Attributes are the arguments of `GradientProbe`.

    Raises:
        ValueError: for what does not make sense.
    """

    measure: frozenset[str]
    per_parameter: bool
    keep_mean: bool
    mode: str
    batchnorm: str
    batch_dim: int
    every: int
    sample: int | None
    check_every: int
    accumulate: int | None = 1

    @classmethod
    def of(cls, measure: str | Iterable[str], **others: Any) -> Options:
        """The options, with one measure or several."""
        words = (measure,) if isinstance(measure, str) else tuple(measure)
        for word in words:
            check_word("measure", word, get_args(Measure))
        for what in ("every", "sample", "check_every", "accumulate"):
            if others[what] is not None:
                others[what] = positive(what, others[what])
        if others["accumulate"] != 1:
            check_adds_up(words)
        check_word("batchnorm", others["batchnorm"], get_args(BatchNorm))
        check_word("mode", others["mode"], get_args(Mode))
        check_dim(others["batch_dim"])
        return cls(frozenset(words), **others)

    def said(self) -> list[str]:
        """In words, what is not as by default; norms are always measured."""
        more = sorted(self.measure - {"norms"})
        words = [f"measure={('norms', *more)}"] if more else []
        return words + [
            f"{name}={getattr(self, name)!r}"
            for name, usual in _USUAL.items()
            if getattr(self, name) != usual
        ]

    @property
    def needs_mean(self) -> bool:
        """Whether passes keep the mean gradient: statistics of several add it up."""
        return self.keep_mean or self.accumulate != 1

    @property
    def is_fused(self) -> bool:
        """Whether the probe makes weight gradients itself."""
        return self.mode == "fused"

    def check_group(self, group: object) -> None:
        """Raise ValueError for what does not go with a process group, or with none."""
        if self.is_fused:
            self._check_fused(group)
        if group is not None and self.batchnorm == "frozen" and not self.needs_mean:
            raise ValueError(
                'batchnorm="frozen" takes another gradient than the one in .grad, so '
                "with process_group it needs keep_mean=True."
            )

    def _check_fused(self, group: object) -> None:
        if group is not None:
            raise ValueError(
                'mode="fused" makes gradients that other ranks wait for, and has none '
                "to give where a layer cannot be read: it does not go with "
                'process_group. Use mode="observe", or leave process_group out and '
                "join the statistics of the ranks by stats.all_reduce()."
            )
        asked = {'measure="gram"': "gram" in self.measure, "sample": self.sample}
        for what, is_asked in asked.items():
            if is_asked:
                raise ValueError(
                    f'mode="fused" makes the weight gradients of whole batches and '
                    f'does not go with {what}. Use mode="observe".'
                )


class Request(NamedTuple):
    """A loss with what was said of it, not checked yet."""

    loss: Tensor
    batch_size: int | None
    reduction: str
    scale: float
    batch_dim: int | None = None
    segment_ids: Tensor | None = None

    def checked(self, batch_dim: int) -> Target:
        """The samples behind the loss; `batch_dim` where none was given.

        Raises:
            ValueError: when something does not make sense.
        """
        check_word("reduction", self.reduction, REDUCTIONS)
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}.")
        if self.segment_ids is not None:
            samples = _segments(self.loss, self.batch_size, self.segment_ids)
        else:
            count = _count(self.loss, self.batch_size)
            dim = batch_dim if self.batch_dim is None else check_dim(self.batch_dim)
            samples = Batch(count, dim)
        is_mean = bool(self.loss.dim()) or self.reduction == "mean"
        if is_mean and not self.loss.dim():
            warn_if_summed(self.loss)
        return Target(self.loss, samples, is_mean, self.scale)

    def mean(self) -> Tensor:
        """What is backpropagated: a scalar as it is, a vector as its mean."""
        if not self.loss.dim():
            return self.loss
        if torch.is_grad_enabled():
            return self.loss.mean()
        # The graph is there, whatever the caller has set.
        with torch.inference_mode(False), torch.enable_grad():
            return self.loss.mean()


class Target(NamedTuple):
    """A loss and the samples behind it."""

    loss: Tensor
    samples: Samples
    is_mean: bool
    scale: float

    @property
    def factor(self) -> float:
        """What a sample's part of a pass is multiplied with to be its own gradient.

        Of a pass that differentiates the loss itself, or the mean of a vector.
        """
        return (self.samples.count if self.is_mean else 1.0) / self.scale


def check_adds_up(measure: str | Iterable[str]) -> None:
    """Raise ValueError for what the statistics of several passes do not add up to."""
    words = (measure,) if isinstance(measure, str) else tuple(measure)
    if "gram" in words:
        raise ValueError(
            'measure="gram" does not go with accumulate: the inner products of samples '
            "of different passes are never seen. Leave one of them out."
        )


def check_word(what: str, word: object, allowed: Sequence[str]) -> None:
    """Raise ValueError for a word that is none of the choices."""
    if word not in allowed:
        words = ", ".join(repr(w) for w in allowed)
        raise ValueError(f"Unknown {what} {word!r}; choose from {words}.")


def positive(what: str, number: int) -> int:
    """A positive integer.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(number, bool) or int(number) != number or number < 1:
        raise ValueError(f"{what} must be a positive integer, got {number!r}.")
    return int(number)


def check_dim(batch_dim: int) -> int:
    """Raise ValueError for a negative dimension."""
    if batch_dim < 0:
        raise ValueError(f"batch_dim must not be negative, got {batch_dim}.")
    return batch_dim


def _count(loss: Tensor, batch_size: int | None) -> int:
    if loss.dim() > 1:
        raise ValueError(
            f"The loss must be a scalar or a vector of per-sample losses, got shape "
            f"{tuple(loss.shape)}. Average each sample's losses first, as in "
            "losses.flatten(1).mean(1)."
        )
    if loss.dim() == 1:
        count = loss.shape[0]
        if count == 0:
            raise CaptureError(
                "The vector of per-sample losses is empty, so there is no sample to "
                "take statistics of. Leave this step out."
            )
        if batch_size not in (None, count):
            raise ValueError(
                f"batch_size={batch_size}, but there are {count} losses; leave it "
                "out for a vector of losses."
            )
        batch_size = count
    if batch_size is None:
        raise ValueError(
            "A scalar loss needs its number of samples: pass batch_size=len(x)."
        )
    return positive("batch_size", batch_size)


def _segments(loss: Tensor, batch_size: int | None, ids: Tensor) -> Segments:
    if ids.dim() == 1:
        ids = ids.unsqueeze(0)
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"segment_ids must be integers of shape [rows, time] (or [time]), got "
            f"{ids.dtype} of shape {tuple(ids.shape)}."
        )
    ids = ids.detach().to(device="cpu", dtype=torch.long)
    lowest, count = (int(ids.min()), int(ids.max()) + 1) if ids.numel() else (0, 0)
    if lowest < -1 or count < 1:
        raise ValueError(
            f"segment_ids number the segments from 0, and -1 marks tokens of none; got "
            f"numbers from {lowest} to {count - 1}."
        )
    if loss.dim() == 0 and batch_size is None:
        batch_size = count
    said = _count(loss, batch_size)
    if said < count:
        raise ValueError(
            f"There are {said} losses or samples, but segment_ids go up to "
            f"{count - 1}. Pass one loss for each segment."
        )
    return Segments(ids, said)


def check_direction(
    name: str, v: Tensor | Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A direction by parameter.

    Raises:
        ValueError: for one that does not fit the parameters.
    """
    if isinstance(v, Tensor):
        total = sum(p.numel() for p in parameters.values())
        if v.shape != (total,):
            raise ValueError(
                f"Direction {name!r} has shape {tuple(v.shape)}; a flat direction "
                f"needs ({total},), all tracked parameters in order."
            )
        pieces = v.split([p.numel() for p in parameters.values()])
        return {
            key: piece.view(p.shape)
            for (key, p), piece in zip(parameters.items(), pieces, strict=True)
        }
    for key, part in v.items():
        if key not in parameters:
            raise ValueError(
                f"Direction {name!r} names {key!r}, which is not a tracked parameter."
            )
        if part.shape != parameters[key].shape:
            raise ValueError(
                f"Direction {name!r} has shape {tuple(part.shape)} for {key!r}, which "
                f"has {tuple(parameters[key].shape)}."
            )
    return dict(v)
