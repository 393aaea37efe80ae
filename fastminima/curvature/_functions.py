"""Whether functions written in Python have a backward that can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._guard import moved
from ._nodes import nodes_of, place_of

__all__ = ["look_at_functions", "look_at_given_functions"]

Evaluate = Callable[[], tuple[Tensor, ...]]
Outputs = list[Tensor | None]

# Functions that run a part of the model again, or all of it: no formula of their own.
_RERUN = ("torch.utils.checkpoint", "torch._functorch", "torch._dynamo")
# What a backward pass may raise that is run by itself: then PyTorch's error will tell.
_ERRORS = (
    *(RuntimeError, ValueError, TypeError, AssertionError),
    *(IndexError, KeyError, AttributeError),
)
_SHARE = 0.5  # of the values, that a smooth dependence changes and a mask does not


def look_at_functions(
    evaluate: Evaluate,
    parameters: Sequence[Tensor],
    names: Mapping[int, str],
    *,
    is_second: bool,
) -> None:
    """ValueError for a function in Python whose derivative would be dropped silently.

    The backward of each is run by itself, on graphs of their own. Its result must have
    a graph to the gradient it was given. If second derivatives are asked for
    (`is_second`), and it has no graph to the function's inputs, it must not depend on
    them: next to the point, most of its values must be the same. A kernel, `detach()`,
    `no_grad()` and NumPy fail that; a reversed gradient, a straight-through estimator
    or a mask does not.
    """
    fixed = _backward(evaluate(), names, is_graph=False)
    linked = _backward(evaluate(), names, is_graph=True)
    eps = max((torch.finfo(p.dtype).eps for p in parameters), default=1e-7)
    with moved(parameters, eps**0.5, seed=0):
        apart = _backward(evaluate(), names, is_graph=False)
    for (label, here), (_, again), (_, there) in zip(
        fixed, linked, apart, strict=False
    ):
        for first, second, third in zip(here, again, there, strict=False):
            if first is None or second is None or third is None:
                continue
            fault = _fault(first, second, third, eps, is_second=is_second)
            if fault:
                raise ValueError(
                    f"Derivatives would be missing here: {label} is a function in "
                    f"Python whose backward {fault} Write it with differentiable "
                    "operations on ctx.saved_tensors (no detach(), no_grad(), NumPy "
                    "or kernels), or use PyTorch's own operations in its place."
                )


def look_at_given_functions(roots: Sequence[Tensor], names: Mapping[int, str]) -> None:
    """ValueError for a function in Python that may have no second derivative.

    As `look_at_functions`, of the one graph there is. Whether a backward without a
    graph to the function's inputs depends on them takes another point to tell.
    """
    found = [
        node for node in _functions(roots) if not _module(node).startswith("torch.")
    ]
    for node in found:
        linked = [part for part in _run(node, is_graph=True) if part is not None]
        fixed = [part for part in _run(node, is_graph=False) if part is not None]
        if any(bool(part.any()) and not part.requires_grad for part in linked):
            fault = "returns values without a graph, which would count as constant"
        elif linked and not any(part.requires_grad for part in fixed):
            fault = "has no graph to the function's inputs; whether it depends on them "
            fault += "cannot be told from one graph"
        else:
            continue
        raise ValueError(
            f"{node.name()} ({place_of(node, names)}) is a function in Python whose "
            f"backward {fault}. Call the probe with a batch once, which looks at "
            "such functions, before it is given losses."
        )


def _module(node: Any) -> str:
    return node._forward_cls.__module__


def _fault(
    first: Tensor, second: Tensor, third: Tensor, eps: float, *, is_second: bool
) -> str | None:
    """What is wrong with one result: as it is, with a graph, and next to the point."""
    if not bool(second.any()):
        return None
    if not second.requires_grad:
        return "returns values without a graph, which would count as constant."
    second = second.detach()
    if first.requires_grad or not is_second or _changed(first, second, eps) > 0:
        return None  # differentiable, not needed, or random
    if first.shape == third.shape and _changed(first, third, eps) > _SHARE:
        return "depends on its inputs in a way that cannot be differentiated."
    return None


def _changed(first: Tensor, second: Tensor, eps: float) -> float:
    """The share of the values, other than zeros, that are not the same."""
    size = torch.maximum(first.abs(), second.abs())
    changed = (first - second).abs() > 2 * eps * size
    return float(changed.sum()) / max(float((size > 0).sum()), 1.0)


def _functions(roots: Sequence[Tensor]) -> list[Any]:
    return [
        node
        for node in nodes_of(roots)
        if (function := getattr(node, "_forward_cls", None)) is not None
        and not (function.__module__ or "").startswith(_RERUN)
    ]


def _backward(
    roots: Sequence[Tensor], names: Mapping[int, str], *, is_graph: bool
) -> list[tuple[str, Outputs]]:
    """Each function with its layer, and what its backward makes of fixed gradients."""
    return [
        (f"{node.name()} ({place_of(node, names)})", _run(node, is_graph))
        for node in _functions(roots)
    ]


def _run(node: Any, is_graph: bool) -> Outputs:
    grads = [_gradient(meta, is_graph) for meta in node._input_metadata]
    try:
        found = node.apply(*grads)
    except _ERRORS:
        return []
    outputs = found if isinstance(found, tuple) else (found,)
    given = {id(grad) for grad in grads}
    return [
        (o if not is_graph or _comes_from(o, given) else o.detach())
        if isinstance(o, Tensor) and o.is_floating_point()
        else None
        for o in outputs
    ]


def _comes_from(output: Tensor, given: set[int]) -> bool:
    """Whether a graph leads back to one of the gradients given.

    What `once_differentiable` returns has a graph that ends at once, in an error that
    nothing meets.
    """
    if id(output) in given:
        return True
    waiting = [output.grad_fn]
    seen = set(waiting)
    for node in waiting:  # the nearest first: the forward pass lies behind
        if id(getattr(node, "variable", None)) in given:
            return True
        for child, _ in node.next_functions if node is not None else ():
            if child not in seen:
                seen.add(child)
                waiting.append(child)
    return False


def _gradient(meta: Any, is_graph: bool) -> Tensor | None:
    """Values between 1/2 and 3/2, the same each time."""
    if not meta.dtype.is_floating_point:
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    shape = tuple(meta.shape)
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
    return (drawn + 0.5).to(meta.device, meta.dtype).requires_grad_(is_graph)
