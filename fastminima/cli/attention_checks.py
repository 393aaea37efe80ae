"""By which kernels a model attends, and what that means for a probe."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .findings import Finding

__all__ = ["is_attention", "of_attention"]

# Parts of the names of nodes of packages, whose attention autograd knows by a function
# written in Python.
_PACKAGES = {
    "flashattn": "flash-attn",
    "fmha": "xformers",
    "flexattention": "flex_attention",
}
_FUSED = "ScaledDotProduct"
_SWITCHES = ("flash", "mem_efficient", "cudnn", "math")
# Only PyTorch's own attention by products uses this softmax.
_BY_PRODUCTS = "SafeSoftmaxBackward0"
_WRITTEN_OUT = "SoftmaxBackward0"
_PRODUCTS = ("BmmBackward0", "BaddbmmBackward0")
# Between the softmax and the product with the values.
_BETWEEN = (
    *("ToCopy", "NativeDropout", "Mul", "Expand", "View", "UnsafeView", "Clone"),
    *("ReshapeAlias", "Transpose", "Unsqueeze", "Squeeze"),
)
_LARGE = 16 << 20  # bytes of scores, from which on they are called slow


def is_attention(name: str) -> bool:
    """Whether a node is that of a package's attention."""
    return _package(name) is not None


def _package(name: str) -> str | None:
    lower = name.lower()
    if name.startswith(_FUSED):
        return None
    return next((told for part, told in _PACKAGES.items() if part in lower), None)


def of_attention(model: nn.Module, nodes: Sequence[Any]) -> Iterator[Finding]:
    """What the graph shows of attention, a finding for each way that it is computed."""
    names = Counter(node.name() for node in nodes)
    asked = _asked_of_transformers(model)
    fused = {n: count for n, count in names.items() if n.startswith(_FUSED)}
    for name, count in fused.items():
        yield _of_fused(name.removeprefix(_FUSED).removesuffix("Backward0"), count)
    packages: Counter[str] = Counter()
    for name, count in names.items():
        if (package := _package(name)) is not None:
            packages[package] += count
    for package, count in packages.items():
        yield _of_package(package, count)
    if scores := [node for node in nodes if node.name() == _BY_PRODUCTS]:
        yield _of_products(scores)
    if scores := _written_out(nodes):
        yield _of_written_out(scores, asked)


def _of_fused(kernel: str, count: int) -> Finding:
    what = f"scaled_dot_product_attention, {kernel}: {_times(count)}"
    why = (
        "No parameter enters there, so it costs the probe nothing. It has no second "
        "derivative: for curvature it is recorded in a form that has one."
    )
    step = "Of a training step itself: fm.twice_differentiable() around its forward."
    if not kernel.startswith("Cudnn"):
        return Finding("ok", "attention", what, why, step)
    return Finding(
        "slow",
        "attention",
        what,
        "It does not give the same bits twice, so at each new structure of the graph a "
        f"further pass shows its noise, and rows are judged beside that. {why}",
        "torch.backends.cuda.enable_cudnn_sdp(False), for the flash kernel.",
    )


def _of_package(package: str, count: int) -> Finding:
    return Finding(
        "note",
        "attention",
        f"{package}: {_times(count)}",
        "No parameter enters there, so the probe runs its backward as it is and needs "
        "no rule for it; where it adds in no fixed order, rows are judged beside the "
        "noise of a further pass. It has no second derivative and is not recorded in "
        "another form, so that curvature is refused.",
        'For curvature a model with attn_implementation="sdpa", or '
        "torch.nn.functional.scaled_dot_product_attention.",
    )


def _of_products(scores: Sequence[Any]) -> Finding:
    off = [
        name
        for name in _SWITCHES
        if not getattr(torch.backends.cuda, f"{name}_sdp_enabled")()
    ]
    if off:
        why = f"Switched off in torch.backends.cuda: {', '.join(off)}."
        remedy = f"torch.backends.cuda.enable_{off[0]}_sdp(True)."
    else:
        why = "No fused kernel takes these arguments."
        remedy = (
            "Leave dropout to the output, give a mask that needs no gradient, or half "
            "precision on a GPU: each may be what is in the way."
        )
    return Finding(
        _verdict(scores),
        "attention",
        f"scaled_dot_product_attention by plain products: {_sized(scores)}",
        f"{why} The probe reads it exactly; scores of all heads are held until the "
        "backward pass.",
        remedy,
    )


def _of_written_out(scores: Sequence[Any], asked: str | None) -> Finding:
    named = "" if asked is None else f" (attn_implementation={asked!r})"
    return Finding(
        _verdict(scores),
        "attention",
        f"written out as products and softmax{named}: {_sized(scores)}",
        "The probe reads it exactly, and curvature goes through it as it is; scores of "
        "all heads are held until the backward pass.",
        'attn_implementation="sdpa"; of nn.MultiheadAttention need_weights=False.',
    )


def _verdict(scores: Sequence[Any]) -> str:
    return "slow" if _bytes(scores) >= _LARGE else "note"


def _sized(scores: Sequence[Any]) -> str:
    return f"{_times(len(scores))}, {_bytes(scores) / 2**20:.3g} MiB of scores"


def _bytes(scores: Sequence[Any]) -> int:
    """Of what comes out of some nodes."""
    # Not of what they saved: a checkpoint would run again, and refuse a second time.
    found = (node._input_metadata[0] for node in scores)
    return sum(math.prod(meta.shape) * meta.dtype.itemsize for meta in found)


def _written_out(nodes: Sequence[Any]) -> list[Any]:
    """Softmaxes of three dims or more that a batched product is taken with."""
    above: dict[Any, list[Any]] = {}
    for node in nodes:
        for below, _ in node.next_functions:
            if below is not None:
                above.setdefault(below, []).append(node)
    return [
        node
        for node in nodes
        if node.name() == _WRITTEN_OUT
        and len(node._input_metadata[0].shape) >= 3
        and _meets_product(node, above)
    ]


def _meets_product(node: Any, above: dict[Any, list[Any]]) -> bool:
    waiting = list(above.get(node, ()))
    while waiting:
        one = waiting.pop()
        if one.name() in _PRODUCTS:
            return True
        if one.name().rstrip("0123456789").removesuffix("Backward") in _BETWEEN:
            waiting += above.get(one, ())
    return False


def _asked_of_transformers(model: nn.Module) -> str | None:
    """The word that a model of transformers was made with."""
    for module in model.modules():
        config = getattr(module, "config", None)
        asked = getattr(config, "_attn_implementation", None)
        if isinstance(asked, str):
            return asked
    return None


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
