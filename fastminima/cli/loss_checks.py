"""What the loss, its graph, the probe and a product tell of a run."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._dtypes import accumulation_dtype
from ..capture import CaptureError, GradientProbe
from ..capture.options import BatchNorm
from ..curvature import Hessian
from .findings import Finding, some
from .target import Target

__all__ = ["of_graph", "of_loss", "of_product", "of_reading"]


def of_loss(losses: Tensor) -> Iterator[Finding]:
    """Whether it has a graph, one number a sample, and finite ones."""
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
    if not bool(losses.isfinite().all()):
        yield Finding("note", "loss", "not finite", "Statistics will say so too.")


def of_graph(losses: Tensor) -> Iterator[Finding]:
    """What the names of autograd's nodes tell."""
    nodes = list(_nodes(losses))
    names = Counter(node.name() for node in nodes)
    written = Counter(node.name() for node in nodes if hasattr(node, "_forward_cls"))
    again = [name for name in written if name.startswith("CheckpointFunction")]
    if again:
        yield Finding(
            "slow",
            "checkpoint",
            f"{written.pop(again[0])} reentrant",
            "Their graphs come into being in the backward pass, and are measured "
            "there; curvature and audits cannot go through them.",
            "checkpoint(..., use_reentrant=False).",
        )
    ours = {name for name in written if name.startswith("CompiledFunction")}
    others = [name for name in written if name not in ours]
    if ours:
        yield Finding(
            "note", "compiled regions", f"{sum(written[n] for n in ours)} in the graph"
        )
    if others:
        yield Finding(
            "note",
            "functions of your own",
            some(others),
            "Parameters inside have no rule, so the general one reads them; curvature "
            "needs a backward of differentiable operations.",
        )
    attention = [n for n in names if "ScaledDotProduct" in n or "FlexAttention" in n]
    if attention:
        yield Finding(
            "note",
            "attention",
            some(attention),
            "It has no second derivative. For curvature "
            "scaled_dot_product_attention is recorded in a form that has one.",
        )


def _nodes(losses: Tensor) -> Iterator[Any]:
    waiting: list[Any] = [losses.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                waiting.append(below)


def of_reading(
    model: nn.Module, losses: Tensor, batchnorm: BatchNorm
) -> Iterator[Finding]:
    """What the probe itself says of the graph."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        audit = _tried(
            lambda: GradientProbe(model, batchnorm=batchnorm).audit(losses, samples=1)
        )
    if isinstance(audit, str):
        yield Finding("refused", "per-sample gradients", "cannot be read", audit)
        return
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
    covered = ", ".join(
        f"{rule} {count}"
        for rule, count in by_rule.most_common()
        if rule != "universal"
    )
    if covered and audit.ok:
        yield Finding("ok", "per-sample gradients", f"read exactly; rules: {covered}")
    for text in dict.fromkeys(str(one.message) for one in told):
        yield Finding("note", "warning", text)


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
        yield Finding("note", "warning", text)


def _tried(make: Callable[[], Any]) -> Any:
    """What is made, or the words by which it is refused."""
    try:
        return make()
    except (CaptureError, ValueError) as error:
        return str(error)
