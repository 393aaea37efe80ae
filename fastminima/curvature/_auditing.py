"""Audits an operator: what the recorded graph shows, and what its products are."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ._audit_products import look_at_differences, look_at_products
from ._checks import Checks
from ._nodes import faults_of, nodes_of, place_of, survey
from ._random import drew_elsewhere
from ._rewrites import Rewrites
from ._same import same
from ._trust import Noise
from .audit import CurvatureAudit, CurvatureCheck

if TYPE_CHECKING:
    from ._graph import Graph
    from ._operator import CurvatureOperator

__all__ = ["audited"]

# Nodes of a gradient's graph that raise when they are differentiated.
_ENDS = ("torch::autograd::Error", "torch::autograd::NotImplemented")
_SHOWN = 6
_NEEDED = ("loss twice", "products")


def audited(operator: CurvatureOperator, seed: int) -> CurvatureAudit:
    """What there is to say of an operator; it stays as it was."""
    twin = copy.copy(operator)
    twin._checks = Checks(type(operator).__name__, operator._model)
    twin._kept = twin._fresh = None
    twin._rewrites = Rewrites()
    lines = _look_at_closures(twin)
    if all(line.ok for line in lines):
        lines += _look_at_graph(twin)
    if all(line.ok for line in lines):
        lines += look_at_products(twin, seed)
        # Differences tell nothing of a loss that is another each time.
        if all(line.ok for line in lines if line.name in _NEEDED):
            lines += look_at_differences(twin, seed, _changing(lines))
    name = f"{type(operator).__name__} {operator.shape[0]} x {operator.shape[1]}"
    return CurvatureAudit(name, tuple(lines))


def _changing(lines: Sequence[CurvatureCheck]) -> str:
    """What the line on buffers says, where some change."""
    return next((x.met for x in lines if x.name == "buffers" and x.verdict != "ok"), "")


def _look_at_closures(twin: CurvatureOperator) -> list[CurvatureCheck]:
    """One evaluation: what it needs, draws, changes, and what its nodes are."""
    lines: list[CurvatureCheck] = []
    try:
        with twin._context():
            twin._random.restore()
            batch, _ = next(iter(twin._batches))
            buffers = [(n, b, b.clone()) for n, b in twin._model.named_buffers()]
            before = _drawn(twin)
            roots = twin._evaluate(batch)
            lines.append(_randomness(twin, before))
            lines.append(_buffers(buffers))
            faults = list(faults_of(roots, twin._checks.names()))
            lines += [_missing(fault) for fault in faults]
            found = survey(roots)
            noise = Noise.of(found, float(roots[-1].detach().mean()))
            lines += [_precision(noise), _rewritten(twin._rewrites)]
            if found.functions and not faults:
                lines.append(_functions(twin, batch, found.functions))
    except ValueError as error:
        lines.append(_refused("closures", "one evaluation", error))
        return lines
    lines += _modes(twin._model)
    twin._checks.noise = noise
    return lines


def _refused(name: str, looked_at: str, error: ValueError) -> CurvatureCheck:
    """A line of what an operator says itself."""
    return CurvatureCheck(
        name, looked_at, "refused", verdict="WRONG", remedy=str(error)
    )


def _missing(fault: str) -> CurvatureCheck:
    met, _, remedy = fault.partition(". ")
    return CurvatureCheck(
        "second derivatives",
        "nodes of the graph",
        f"{met}.",
        None,
        None,
        "WRONG",
        remedy,
    )


def _functions(
    twin: CurvatureOperator, batch: Any, names: Sequence[str]
) -> CurvatureCheck:
    looked_at = f"backward of {', '.join(dict.fromkeys(names))}, run by itself"
    try:
        twin._random.restore()
        twin._look_at_functions(batch)
    except ValueError as error:
        return _refused("functions", looked_at, error)
    return CurvatureCheck("functions", looked_at, "has a graph, or needs none")


def _drawn(twin: CurvatureOperator) -> list[Any]:
    """The states of the global generators, to be compared."""
    device = twin._layout.device
    states: list[Any] = [torch.get_rng_state().tolist(), random.getstate()]
    numpy = np.random.get_state(legacy=True)  # noqa: NPY002
    states.append([np.asarray(part).tolist() for part in numpy])
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).tolist())
    return states


def _randomness(twin: CurvatureOperator, before: list[Any]) -> CurvatureCheck:
    name, looked_at = "random numbers", "the generators before and after an evaluation"
    own = [
        f"layer {name!r} holds its own {held[0]!r}"
        for name, module in twin._model.named_modules()
        if (held := drew_elsewhere(module))
    ]
    if own:
        return CurvatureCheck(
            *(name, looked_at, "; ".join(own[:_SHOWN]), None, None, "note"),
            "Nobody sets it back: see that the product is the same twice.",
        )
    if before == _drawn(twin):
        return CurvatureCheck(name, looked_at, "none drawn")
    return CurvatureCheck(
        *(name, looked_at, "some drawn: dropout, noise, samples", None, None, "note"),
        "The operator is that of one fixed draw. model.eval() turns dropout off.",
    )


def _buffers(buffers: Sequence[tuple[str, Tensor, Tensor]]) -> CurvatureCheck:
    changed = [name for name, now, then in buffers if not same(now, then)]
    looked_at = f"{len(buffers)} buffers before and after an evaluation"
    if not changed:
        return CurvatureCheck("buffers", looked_at, "none changed")
    return CurvatureCheck(
        *("buffers", looked_at, f"changed: {_listed(changed)}", None, None, "note"),
        "They were put back. Where the result of a training-mode layer depends on them "
        "(spectral norm, quantisation), use model.eval().",
    )


def _precision(noise: Noise) -> CurvatureCheck:
    narrow = str(noise.dtype).removeprefix("torch.")
    met = (
        f"two evaluations may differ by {noise.repeat:.0e}, <u, A v> and <A u, v> by "
        f"{noise.symmetry:.0e}"
    )
    is_half = torch.finfo(noise.dtype).eps > 1e-4
    return CurvatureCheck(
        *("precision", f"narrowest dtype of the graph: {narrow}", met, None, None),
        "note" if is_half else "ok",
        "Residuals below that are rounding. Leave autocast out of the closure, or "
        "raise the precision of matrix products, to have more."
        if is_half
        else "",
    )


def _rewritten(rewrites: Rewrites) -> CurvatureCheck:
    looked_at = "functions whose usual kernel has no right second derivative"
    if not rewrites.met:
        return CurvatureCheck("rewritten", looked_at, "none met")
    calls = [f"{name} ({n} calls)" for name, n in sorted(rewrites.met.items())]
    met = f"computed in another form, to the same values: {_listed(calls)}"
    return CurvatureCheck("rewritten", looked_at, met, None, None, "note")


def _modes(model: nn.Module) -> list[CurvatureCheck]:
    norms = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ]
    if not norms:
        return []
    return [
        CurvatureCheck(
            *("batch norm", "modes of the layers"),
            f"{len(norms)} in training mode: {_listed(norms)}",
            *(None, None, "note"),
            "Each sample's loss depends on those that share its batch. model.eval() "
            "uses the running statistics.",
        )
    ]


def _look_at_graph(twin: CurvatureOperator) -> list[CurvatureCheck]:
    """The gradient's graph: where it ends, and which parameters it reaches."""
    looked_at = "the gradient, recorded"
    try:
        with twin._context():
            twin._random.restore()
            batch, weight = next(iter(twin._batches))
            graph = twin._record(batch, weight)
            lines = _ends(twin, graph)
            with twin._explained(graph.roots):
                lines.append(_reach(twin, graph))
    except ValueError as error:
        return [_refused("recording", looked_at, error)]
    return lines


def _ends(twin: CurvatureOperator, graph: Graph) -> list[CurvatureCheck]:
    reached = [part for part in graph.reached if part is not None]
    nodes = list(nodes_of(reached))
    names = twin._checks.names()
    found = [node for node in nodes if node.name() in _ENDS]
    looked_at = f"{len(nodes)} nodes of the gradient's graph"
    if not found:
        return [CurvatureCheck("second derivatives", looked_at, "all have one")]
    places = dict.fromkeys(place_of(node, names) for node in found)
    met = f"{len(found)} end in an error: {_listed(list(places))}"
    return [
        CurvatureCheck(
            *("second derivatives", looked_at, met, None, None, "WRONG"),
            "Use other operations in the functions there; a product names the node.",
        )
    ]


def _reach(twin: CurvatureOperator, graph: Graph) -> CurvatureCheck:
    layout, looked_at = twin._layout, "which parameters the loss reaches"
    idle = [
        name
        for name, part in zip(layout.names, graph.reached, strict=True)
        if part is None
    ]
    product = getattr(graph, "product", None)
    linear: list[str] = []
    if product is not None:
        ones = [torch.ones_like(p) for p in layout.parameters]
        linear = [
            name
            for name, part in zip(layout.names, product(ones), strict=True)
            if part is None and name not in idle
        ]
    if not idle and not linear:
        return CurvatureCheck("reach", looked_at, f"all {len(layout.names)}, twice")
    parts = [f"not reached: {_listed(idle)}"] if idle else []
    parts += [f"reached at first order only: {_listed(linear)}"] if linear else []
    return CurvatureCheck(
        *("reach", looked_at, "; ".join(parts), None, None, "note"),
        "Their rows are zero. Freeze with requires_grad_(False) what is idle; where "
        "more was expected, look for detach() and no_grad().",
    )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {more} more" if more > 0 else shown
