"""What the loss, the probe and a product tell of a run."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._dtypes import accumulation_dtype
from ..capture import Audit, CaptureError, GradientProbe
from ..capture.options import BatchNorm
from ..curvature import Hessian
from .compile_checks import RUNS_AGAIN
from .findings import Finding, some
from .target import Target

__all__ = ["Reading", "of_loss", "of_product", "of_reading", "read"]

_TOLD_ELSEWHERE = (RUNS_AGAIN, "No rule for")


def of_loss(losses: Tensor, size: int | None) -> Iterator[Finding]:
    """Whether it has a graph, one number a sample, and finite ones.

    Args:
        losses: the vector, or their mean.
        size: samples in the batch, as far as that is known.
    """
    if not losses.requires_grad:
        yield Finding(
            "refused",
            "loss",
            "it has no graph",
            "No parameter that requires a gradient took part in it, or gradients are "
            "off.",
            "Compute it with this model, and outside torch.no_grad().",
        )
    if losses.dim() == 0:
        yield Finding(
            "note",
            "loss",
            "a scalar",
            "The axis of its samples is then found from how it was made, and an audit "
            "needs the vector.",
            'reduction="none", or batch_size= at each call.',
        )
    elif losses.dim() > 1:
        yield Finding(
            "refused",
            "loss",
            f"shape {tuple(losses.shape)}",
            remedy="One loss a sample: average or sum over the other axes.",
        )
    elif len(losses) == 1:
        yield Finding(
            "note",
            "batch",
            "one sample",
            "Variance and noise scale need two.",
            "A larger batch, or statistics added over several.",
        )
    elif size is not None and len(losses) != size:
        yield Finding(
            "note",
            "loss",
            f"{len(losses)} losses for a batch of {size}",
            "Each loss is taken for a sample. If they are tokens or pixels of fewer "
            "samples, layers that mix them are refused.",
            "One loss a sample: average over the other axes.",
        )
    if not bool(losses.isfinite().all()):
        yield Finding("note", "loss", "not finite", "Statistics will say so too.")


@dataclass(frozen=True)
class Reading:
    """What a probe said of a loss.

    Attributes:
        error: the words by which it refuses it; None where it reads it.
        audit: beside plain autograd; None where that cannot be had.
        told: its warnings.
        samples: how many there are.
    """

    error: str | None
    audit: Audit | None
    told: tuple[str, ...]
    samples: int | None


def read(model: nn.Module, losses: Tensor, batchnorm: BatchNorm, size: int) -> Reading:
    """Have a probe read the graph, and compare it with autograd where that can be.

    Args:
        model: whose parameters are tracked.
        losses: a vector, or their mean.
        batchnorm: as for the probe.
        size: samples behind a mean.
    """
    is_vector = losses.dim() == 1
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        probe = _tried(lambda: GradientProbe(model, batchnorm=batchnorm))
        if isinstance(probe, str):
            return Reading(probe, None, (), None)
        audit = _tried(lambda: probe.audit(losses, samples=1)) if is_vector else ""
        error = None
        if isinstance(audit, str):  # parts that only a real pass goes through?
            count = None if is_vector else size
            error = _tried(lambda: probe.attach(losses, count))
            probe.detach()
    return Reading(
        error,
        None if isinstance(audit, str) else audit,
        tuple(dict.fromkeys(str(one.message) for one in told)),
        len(losses) if is_vector else size,
    )


def of_reading(reading: Reading) -> Iterator[Finding]:
    """What the probe itself says of the graph."""
    if reading.error is not None:
        subject = "per-sample gradients"
        yield Finding("refused", subject, "cannot be read", reading.error)
        return
    if reading.audit is None:
        yield Finding(
            "ok",
            "per-sample gradients",
            f"can be read, of {reading.samples} samples",
            "Not compared with autograd, which needs a vector of losses and a graph "
            "that torch.autograd.grad goes through.",
        )
    else:
        yield from _of_audit(reading.audit)
    for text in reading.told:
        if text.startswith("Samples meet behind"):
            yield Finding("slow", "terms that are zero", "samples meet in them", text)
        elif not text.startswith(_TOLD_ELSEWHERE):
            yield Finding("note", "warning", "of the probe", text)


def _of_audit(audit: Audit) -> Iterator[Finding]:
    by_rule = Counter(rule for row in audit.rows for rule in set(row.rules))
    general = [row.parameter for row in audit.rows if "universal" in row.rules]
    if general:
        yield Finding(
            "slow",
            "rules",
            f"none for {some(general)}",
            "The general way is exact and makes the gradients of single samples.",
            "Keep these layers small, or build them of products, convolutions and "
            "elementwise operations.",
        )
    if not audit.ok:
        wrong = [row.parameter for row in audit.rows if not row.ok]
        yield Finding(
            "refused",
            "per-sample gradients",
            f"differ from plain autograd at {some(wrong)}",
            "This should not be: please report it, with what `audit` prints.",
        )
    if audit.unreached:
        yield Finding(
            "note", "not reached", some(list(audit.unreached)), "They count as zero."
        )
    by_rule["in compiled regions"] = sum(not row.rules for row in audit.rows)
    covered = ", ".join(
        f"{rule} {count}"
        for rule, count in by_rule.most_common()
        if rule != "universal" and count
    )
    if covered and audit.ok:
        yield Finding("ok", "per-sample gradients", f"read exactly; rules: {covered}")


def of_product(target: Target) -> Iterator[Finding]:
    """One Hessian-vector product, which is where curvature is refused."""
    count = sum(p.numel() for p in target.model.parameters() if p.requires_grad)
    first = next(p for p in target.model.parameters() if p.requires_grad)
    dtype = accumulation_dtype(first.dtype)
    generator = torch.Generator("cpu").manual_seed(0)
    vector = torch.randn(
        count, generator=generator, dtype=torch.float32, device="cpu"
    ).to(first.device, dtype)

    def multiply() -> Hessian:
        hessian = Hessian(target.model, target.mean, target.batch)
        _ = hessian @ vector
        return hessian

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = _tried(multiply)
    if isinstance(found, str):
        yield Finding("refused", "curvature", "has no products", found)
    else:
        yield Finding("ok", "curvature", f"a product works; engine {found.engine!r}")
    for text in dict.fromkeys(str(one.message) for one in told):
        yield Finding("note", "warning", "of the product", text)


def _tried(make: Callable[[], Any]) -> Any:
    """What is made, or the words by which it is refused."""
    try:
        return make()
    except (CaptureError, ValueError) as error:
        return str(error)
