"""Loss and curvature along the straight line through two trained networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .stacks import cross_entropy

__all__ = [
    "STATISTICS",
    "Line",
    "along_line",
    "between",
    "curvature_along",
    "re_estimate",
]

# Losses [samples] of scores [samples, classes] and labels [samples].
Loss = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]

STATISTICS = ("re-estimated", "interpolated")
_NORM = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Line:
    """Mean loss, and share of right answers, at each alpha."""

    alphas: tuple[float, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]


def along_line(
    first: nn.Module,
    second: nn.Module,
    alphas: Sequence[float],
    data: Mapping[str, Batch],
    *,
    images: Tensor | None = None,
    statistics: str = "re-estimated",
    loss: Loss = cross_entropy,
    piece: int = 500,
) -> dict[str, Line]:
    """Loss and accuracy of (1 - alpha) first + alpha second, in evaluation mode.

    Dropout is off. The statistics of batch normalisation fit neither end in between:
    re-estimate them, which is what the network would be after some training steps of
    rate 0, or take the mixture of those of the ends. Changes neither network.

    Args:
        first, second: of one architecture, on one device.
        alphas: places; 0 is the first network, 1 the second, [-1, 2] the paper's.
        data: sets to measure, by name, on the same device.
        images: to re-estimate the statistics from, training images; needed by networks
            with batch normalisation unless `statistics` is "interpolated".
        statistics: "re-estimated" or "interpolated".
        loss: of each sample.
        piece: samples at a time, those of a batch of re-estimation too.

    Raises:
        ValueError: for networks that differ, or no images.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in data}
    for alpha in alphas:
        model = _at(first, second, alpha, images, statistics, piece)
        for name, batch in data.items():
            found[name].append(_measured(model, batch, loss, piece))
    return {
        name: Line(tuple(alphas), tuple(v[0] for v in at), tuple(v[1] for v in at))
        for name, at in found.items()
    }


def curvature_along(
    first: nn.Module,
    second: nn.Module,
    data: Batch,
    *,
    at: Sequence[float] = (0.0, 1.0),
    method: str = "exact",
    step: float = 0.05,
    images: Tensor | None = None,
    statistics: str = "re-estimated",
    loss: Loss = cross_entropy,
    piece: int = 500,
) -> tuple[float, ...]:
    """d^2 L / d alpha^2 along the line, in units of the loss, at each place of `at`.

    With delta = second - first that is delta^T H delta. "exact" differentiates twice,
    the statistics of batch normalisation being constants, those at that place.
    "difference" is (L(a + h) - 2 L(a) + L(a - h)) / h^2 for h = `step`, the statistics
    being those of each of the three places; on ReLU networks it counts the kinks within
    the step as well. Other arguments as of `along_line`.

    Raises:
        ValueError: for another method, and as `along_line`.
    """
    if method not in ("exact", "difference"):
        raise ValueError(f'method must be "exact" or "difference", got {method!r}.')
    found = []
    for alpha in at:
        if method == "exact":
            model = _at(first, second, alpha, images, statistics, piece)
            found.append(_second_derivative(first, second, model, data, loss, piece))
            continue
        places = (alpha - step, alpha, alpha + step)
        below, middle, above = along_line(
            first,
            second,
            places,
            {"": data},
            images=images,
            statistics=statistics,
            loss=loss,
            piece=piece,
        )[""].losses
        found.append((below - 2 * middle + above) / step**2)
    return tuple(found)


@torch.no_grad()
def between(first: nn.Module, second: nn.Module, alpha: float) -> nn.Module:
    """A network with the parameters and statistics (1 - alpha) first + alpha second.

    In evaluation mode. Counters are those of the first; a variance that comes out
    negative beyond the ends is 0.

    Raises:
        ValueError: if the two are not of one architecture.
    """
    ours, theirs = first.state_dict(), second.state_dict()
    shapes = [{k: v.shape for k, v in s.items()} for s in (ours, theirs)]
    if shapes[0] != shapes[1]:
        differing = sorted(
            k
            for k in ours.keys() | theirs.keys()
            if shapes[0].get(k) != shapes[1].get(k)
        )
        raise ValueError(
            f"No line joins two networks that differ in {', '.join(differing)}."
        )
    model = copy.deepcopy(first)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_((1 - alpha) * ours[name] + alpha * theirs[name])
            if name.endswith("running_var"):
                value.clamp_(min=0)
    model.zero_grad()
    return model.eval()


@torch.no_grad()
def re_estimate(model: nn.Module, images: Tensor, piece: int = 500) -> nn.Module:
    """Make the statistics of batch normalisation the means over batches of images.

    In place, and returns it in evaluation mode. Batches are `piece` images in their
    order, a last, shorter one left out if there are others; dropout is off.
    """
    norms = [m for m in model.modules() if isinstance(m, _NORM) and _has_statistics(m)]
    if not norms:
        return model.eval()
    model.eval()
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    whole = max(len(images) // piece * piece, min(piece, len(images)))
    for part in images[:whole].split(piece):
        model(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def _at(
    first: nn.Module,
    second: nn.Module,
    alpha: float,
    images: Tensor | None,
    statistics: str,
    piece: int,
) -> nn.Module:
    if statistics not in STATISTICS:
        raise ValueError(f"statistics must be one of {STATISTICS}, got {statistics!r}.")
    model = between(first, second, alpha)
    if statistics == "interpolated":
        return model
    if images is not None:
        return re_estimate(model, images, piece)
    if any(isinstance(m, _NORM) and _has_statistics(m) for m in model.modules()):
        raise ValueError(
            "The statistics of batch normalisation are re-estimated from training "
            'images, got None. Give images=, or statistics="interpolated".'
        )
    return model


@torch.no_grad()
def _measured(
    model: nn.Module, batch: Batch, loss: Loss, piece: int
) -> tuple[float, float]:
    """Mean loss and accuracy."""
    total, right = 0.0, 0
    for x, y in _pieces(batch, piece):
        scores = model(x)
        total += float(loss(scores, y).double().sum())
        right += int((scores.argmax(dim=1) == y).sum())
    return total / len(batch[1]), right / len(batch[1])


def _second_derivative(
    first: nn.Module,
    second: nn.Module,
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    piece: int,
) -> float:
    """d^2 / dt^2 of the loss of `model` moved by t (second - first), at t = 0."""
    here = {k: p.detach() for k, p in model.named_parameters()}
    ends = [dict(m.named_parameters()) for m in (first, second)]
    along = {k: (ends[1][k] - ends[0][k]).detach() for k in here}
    like, total = next(iter(here.values())), 0.0
    for x, y in _pieces(batch, piece):
        t = like.new_zeros(()).requires_grad_()
        moved = {k: p + t * along[k] for k, p in here.items()}
        value = loss(functional_call(model, moved, (x,)), y).sum()
        (slope,) = torch.autograd.grad(value, t, create_graph=True)
        (bend,) = torch.autograd.grad(slope, t)
        total += float(bend)
    return total / len(batch[1])


def _pieces(batch: Batch, piece: int) -> Iterator[Batch]:
    return zip(batch[0].split(piece), batch[1].split(piece), strict=True)


def _has_statistics(norm: nn.Module) -> bool:
    return norm.running_mean is not None
