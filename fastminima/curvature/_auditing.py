"""Audits an operator: what the recorded graph shows, and what its products are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._audit_closures import (
    buffers,
    drawn,
    modes,
    precision,
    randomness,
    rewritten,
)
from ._audit_graph import ends, missing, reach
from ._audit_products import look_at_differences, look_at_products
from ._nodes import faults_of, survey
from ._operator import CurvatureOperator
from ._trust import Noise
from .audit import CurvatureAudit, CurvatureCheck, refuse_ranks

__all__ = ["AuditedOperator"]

_NEEDED = ("loss twice", "products")


class AuditedOperator(CurvatureOperator):
    """An operator that looks at everything by which its products could be wrong."""

    def audit(self, *, seed: int = 0) -> CurvatureAudit:
        """Look at everything by which products could be wrong; prints as a table.

        The loss and a product twice, symmetry between random vectors, the gradient and
        a product beside central differences in double (of one batch, where no kink is
        crossed), nodes without a second derivative, parameters not reached, what the
        closures draw and change, and what is computed in another form. It costs about
        a hundred gradients and a copy of the model in double, and changes nothing: not
        the model, its gradients, the generators or the kept graph.

        Args:
            seed: Of the random vectors.

        Raises:
            ValueError: Where several ranks have the data between them.

        Example:
            >>> import torch
            >>> import fastminima as fm
            >>> model = torch.nn.Linear(2, 1)
            >>> x = torch.ones(4, 2)
            >>> H = fm.Hessian(model, lambda model, x: model(x).square().mean(), x)
            >>> H.audit().ok
            True
        """
        refuse_ranks(self._ranks)
        return _audited(self, seed)


def _audited(operator: CurvatureOperator, seed: int) -> CurvatureAudit:
    """What there is to say of an operator; it stays as it was."""
    twin = operator._for_audit()
    lines = _look_at_closures(twin)
    if all(line.ok for line in lines):
        lines += _look_at_graph(twin)
    if all(line.ok for line in lines):
        lines += look_at_products(twin, seed)
        # Differences tell nothing of a loss that is another each time.
        if all(line.ok for line in lines if line.name in _NEEDED):
            lines += look_at_differences(twin, seed, _causes(lines))
    name = f"{type(operator).__name__} {operator.shape[0]} x {operator.shape[1]}"
    return CurvatureAudit(name, tuple(lines))


def _causes(lines: Sequence[CurvatureCheck]) -> str:
    """What is known to come between a gradient and differences, if met."""
    met = {line.name: line.met for line in lines if line.verdict == "note"}
    causes = ""
    if "buffers" in met:
        causes += f" Buffers that change with the parameters do that: {met['buffers']}."
    if "max_norm" in met.get("rewritten", ""):
        causes += " An embedding with max_norm rescales rows without a gradient, which "
        causes += "is meant: the gradient is that by the rescaled rows."
    return causes


def _look_at_closures(twin: CurvatureOperator) -> list[CurvatureCheck]:
    """One evaluation: what it needs, draws, changes, and what its nodes are."""
    lines: list[CurvatureCheck] = []
    try:
        with twin._context():
            twin._random.restore()
            batch, weight = next(iter(twin._batches))
            copies = [(n, b, b.clone()) for n, b in twin._model.named_buffers()]
            before = drawn(twin)
            roots = twin._evaluate(batch)
            lines.append(randomness(twin, before))
            lines.append(buffers(copies))
            faults = list(faults_of(roots, twin._checks.names()))
            lines += [missing(fault) for fault in faults]
            found = survey(roots)
            noise = Noise.of(found, float(roots[-1].detach().mean()))
            lines += [precision(noise), rewritten(twin._rewrites)]
            if not twin._batches.is_single:
                lines.append(_weights(twin, batch, weight))
            if found.functions and not faults:
                lines.append(_functions(twin, batch, found.functions))
    except ValueError as error:
        lines.append(_refused("closures", "one evaluation", error))
        return lines
    lines += modes(twin._model)
    twin._checks.noise = noise
    return lines


def _refused(name: str, looked_at: str, error: ValueError) -> CurvatureCheck:
    """A line of what an operator says itself."""
    return CurvatureCheck(
        name, looked_at, "refused", verdict="WRONG", remedy=str(error)
    )


def _weights(twin: CurvatureOperator, batch: Any, weight: int) -> CurvatureCheck:
    looked_at = f"how the loss weighs the {weight} rows of the first batch"
    try:
        twin._weigh(batch, weight)
    except ValueError as error:
        return _refused("weights", looked_at, error)
    return CurvatureCheck("weights", looked_at, "alike, given, or not to be told")


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


def _look_at_graph(twin: CurvatureOperator) -> list[CurvatureCheck]:
    """The gradient's graph: where it ends, and which parameters it reaches."""
    looked_at = "the gradient, recorded"
    try:
        with twin._context():
            twin._random.restore()
            batch, weight = next(iter(twin._batches))
            graph = twin._record(batch, weight)
            lines = ends(twin._checks.names(), graph)
            with twin._explained(graph.roots):
                lines.append(reach(twin._layout, graph))
    except ValueError as error:
        return [_refused("recording", looked_at, error)]
    return lines
