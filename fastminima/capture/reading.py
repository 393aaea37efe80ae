"""Read a graph: its uses and the sample of every row, found once and remembered."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import batchnorm
from .errors import CaptureError
from .gathers import (
    Guard,
    find_guards,
    placing_numbers,
    read_numbers,
    watched_sources,
)
from .layout import IrregularLayout, RegularLayout, RowLayout
from .measure import Measurement, Weighting, measure_samples
from .passes import run_pass
from .plan import Plan, find_plan, is_spread, reads_data, watched_nodes
from .roots import batch_edges, weigh_edges
from .routes import Routes, find_routes
from .stretches import VIEWS
from .tape import Tape

__all__ = ["Reader", "Reading"]

Layouts = list[list[RowLayout | None]]
# Sizes of a graph are measured this often before a layout is carried over to new ones.
_MEASURED_SIZES = 3
_MOST_SIZES = 256
_MOST_STRUCTURES = 64


@dataclass
class Reading:
    """A graph that is understood: what to hook and how to read it."""

    tape: Tape
    plan: Plan
    layouts: Layouts
    mixing: list[int]


@dataclass
class _Known:
    """What was found out about one graph structure."""

    plan: Plan
    norms: list[int]  # batch normalisations, in whatever mode
    placing: list[tuple[int, tuple[str, ...]]]  # numbers that say where rows go
    layouts: dict[tuple, Layouts] = field(default_factory=dict)
    routes: dict[tuple, Routes] = field(default_factory=dict)  # where rows are routed
    routed: frozenset[int] = frozenset()  # uses whose layouts the routes give
    measured: list[tuple] = field(default_factory=list)
    guards: list[Guard] = field(default_factory=list)
    follows: bool = True  # measured layouts were those carried over from the first


class Reader:
    """Finds the uses of a model's parameters, measuring each new graph structure once.

    Args:
        parameters: the tracked parameters by name.
        batchnorm: "error", "rows" or "frozen".
        model: the module, if there is one: names its parts in messages, and tells its
            buffers from data.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        batchnorm: str,
        model: nn.Module | None,
    ) -> None:
        self._names = {id(p): name for name, p in parameters.items()}
        self._batchnorm = batchnorm
        self._model = model
        self._modules = {} if model is None else _owners(model)
        self._known: dict[tuple, _Known] = {}

    def read(self, loss: Tensor, batch: int, batch_dim: int) -> Reading:
        """Walk the graph of `loss` and say how to read it for `batch` samples.

        `batch_dim` is the batch dimension of the tensors a scalar loss is made of.

        Raises:
            CaptureError: for a graph that cannot be read exactly.
        """
        if loss.grad_fn is None:
            raise CaptureError(
                "The loss has no graph: none of the tracked parameters took part in "
                "it, or it was computed under torch.no_grad(). Compute it with "
                "gradients on."
            )
        tape = Tape(loss.grad_fn, self._names)
        if not tape.leaves:
            raise CaptureError(
                f"The loss reaches none of the {len(self._names)} tracked parameters. "
                "Check that it was computed with this model, and that the parameters "
                "require gradients."
            )
        key = (tape.key, batch > 1, batch_dim if loss.dim() == 0 else None)
        known = self._known.get(key)
        if known is None:
            _refuse_compiled(tape)
            _refuse_complex(tape)
            _refuse_nested(tape)
            while len(self._known) >= _MOST_STRUCTURES:  # unrolled loops of any length
                self._known.pop(next(iter(self._known)))
        candidates = None if known is None else known.norms
        mixing = batchnorm.mixing_nodes(tape, batch, candidates)
        if mixing and self._batchnorm == "error":
            raise CaptureError(self._mixing_message(tape, mixing))
        layouts = self._recall(known, tape, batch) if known is not None else None
        if layouts is None:
            return self._measure(key, tape, loss, batch, batch_dim, mixing)
        assert known is not None
        reading = Reading(tape, known.plan.sized(tape), layouts, mixing)
        self._refuse_mixing_uses(reading, None)
        return reading

    def _refuse_mixing_uses(
        self, reading: Reading, measured: Mapping[int, list[Measurement | None]] | None
    ) -> None:
        """Raise for a use that mixes samples by itself.

        For a normalisation that depends on its layout, which may not be sure yet where
        it was `measured` in this step.
        """
        tape = reading.tape
        for use, (layout, *_) in zip(reading.plan.uses, reading.layouts, strict=True):
            if layout is None or layout.batch == 1:
                continue
            if batchnorm.counts_in_batch(tape, use.node):
                does = (
                    "divides gradients by how often an index is in the batch "
                    "(scale_grad_by_freq=True)"
                )
            elif (
                # Any other choice than "error" says what is meant.
                not (use.name in batchnorm.BATCH_NORM and self._batchnorm != "error")
                and batchnorm.normalises_over(tape, use.node, layout)
                and (measured is None or _is_sure(measured[use.node], layout.batch))
            ):
                does = "takes its statistics over several samples"
            else:
                continue
            raise CaptureError(
                f"{use.name} at {self._module_at(tape, use.node)} {does}, so the "
                "gradient of one sample depends on the others. Change the layer, or "
                "use MinibatchVariance."
            )

    def _recall(self, known: _Known, tape: Tape, batch: int) -> Layouts | None:
        if not all(guard.holds(tape) for guard in known.guards):
            return None
        signature = _signature(tape, known, batch)
        layouts = known.layouts.get(signature)
        if layouts is None and len(known.measured) >= _MEASURED_SIZES and known.follows:
            layouts = _carried_over(known, signature)
            routes = known.routes.get(known.measured[0])
            if layouts is not None and routes is not None:
                routes = routes.resized(tape, batch)
                layouts = layouts if routes is not None else None
            if layouts is not None:
                self._remember(known, signature, layouts, routes)
        if layouts is None:
            return None
        return _with_routed(
            tape, known.plan, layouts, known.routes.get(signature), batch
        )

    def _remember(
        self,
        known: _Known,
        signature: tuple,
        layouts: Layouts,
        routes: Routes | None,
    ) -> None:
        if len(known.layouts) >= _MOST_SIZES:
            known.layouts = {s: known.layouts[s] for s in known.measured}
            known.routes = {s: r for s, r in known.routes.items() if s in known.layouts}
        known.layouts[signature] = layouts
        if routes is not None:
            known.routes[signature] = routes

    def _measure(
        self,
        key: tuple,
        tape: Tape,
        loss: Tensor,
        batch: int,
        batch_dim: int,
        mixing: list[int],
    ) -> Reading:
        if batch == 1:
            plan = find_plan(tape, None)
            layouts = [_all_of_one(tape.shapes(use.node)) for use in plan.uses]
            known = self._known[key] = _Known(plan, batchnorm.norm_nodes(tape), [])
            known.layouts[_signature(tape, known, 1)] = layouts
            return Reading(tape, plan, layouts, mixing)
        near = watched_nodes(tape)
        views = [view for i in near for view in _views_of(tape, i)]
        watched = sorted({*near, *views, *watched_sources(tape, batch)})
        roots = {} if loss.dim() else batch_edges(tape, batch, batch_dim)

        def weighting(weights: Tensor) -> list[Any]:
            handles = weigh_edges(tape, roots, weights, batch_dim)
            return handles + batchnorm.freeze(tape, mixing)

        measured = self._measured_samples(tape, watched, loss, batch, weighting)
        plan = find_plan(tape, measured)
        routes = find_routes(tape, measured, batch, plan.preparing)
        routed = frozenset(routes.nodes if routes else ())
        layouts, is_settled = self._layouts(tape, plan, measured, batch, routed)
        own = self._storages()
        for i in plan.preparing:
            if reads_data(tape, i, own) and not is_spread(tape, plan, layouts, i):
                raise CaptureError(self._mixed_message(tape, i, batch))
        complete = _with_routed(tape, plan, layouts, routes, batch)
        assert complete is not None  # the routes agree with this very graph
        reading = Reading(tape, plan, complete, mixing)
        covered = routes.covered if routes else ()
        self._refuse_mixing_uses(reading, measured)
        guards = find_guards(tape, measured, batch, plan.preparing, covered)
        if guards is None or not is_settled:
            self._known.pop(key, None)
            return reading
        known = self._known.get(key)
        learned = (plan.uses, guards, routed)
        if known is None or (known.plan.uses, known.guards, known.routed) != learned:
            norms = batchnorm.norm_nodes(tape)
            placing = placing_numbers(tape, plan.preparing)
            known = self._known[key] = _Known(plan, norms, placing, guards=guards)
            known.routed = routed
        signature = _signature(tape, known, batch)
        if known.measured:
            known.follows &= _carried_over(known, signature) == layouts
        if signature not in known.layouts:
            known.measured.append(signature)
        self._remember(known, signature, layouts, routes)
        return reading

    def _measured_samples(
        self,
        tape: Tape,
        watched: list[int],
        loss: Tensor,
        batch: int,
        weighting: Weighting,
    ) -> dict[int, list[Measurement | None]]:
        def backward(weights: Tensor, leaves: list[Tensor]) -> None:
            weights = weights.to(device=loss.device, dtype=loss.dtype)
            run_pass(loss, leaves, self, weights if loss.dim() else None)

        has_half = any(
            meta.dtype == torch.float16
            for i in watched
            for meta in tape.nodes[i]._input_metadata
        )
        return measure_samples(tape, watched, batch, weighting, backward, has_half)

    def _storages(self) -> set[int]:
        """Addresses of all that the model itself holds."""
        if self._model is None:
            return set()
        held = (*self._model.parameters(), *self._model.buffers())
        return {t.untyped_storage().data_ptr() for t in held}

    def _layouts(
        self,
        tape: Tape,
        plan: Plan,
        measured: Mapping[int, list[Measurement | None]],
        batch: int,
        routed: Container[int],
    ) -> tuple[Layouts, bool]:
        """Layouts of all uses but the routed ones, and whether they may be kept."""
        layouts: Layouts = []
        is_settled = True
        for use in plan.uses:
            of_use: list[RowLayout | None] = []
            for measurement in () if use.node in routed else measured[use.node]:
                if measurement is None:
                    of_use.append(None)
                    continue
                found = measurement.layouts(batch)
                if len(found) > 1:
                    found = _like_views(found, tape, use.node, measured, batch)
                if not found:
                    raise CaptureError(self._mixed_message(tape, use.node, batch))
                is_settled &= len(found) == 1 and isinstance(found[0], RegularLayout)
                is_settled &= measurement.shows_all(batch)
                of_use.append(found[0])
            layouts.append(of_use)
        return layouts, is_settled

    def _mixing_message(self, tape: Tape, mixing: list[int]) -> str:
        names = [self._module_at(tape, i) for i in mixing]
        shown = ", ".join(dict.fromkeys(names[:4])) + (
            ", ..." if len(names) > 4 else ""
        )
        return (
            f"Batch normalisation in training mode mixes the samples of a batch "
            f"({len(mixing)} layers: {shown}), so the loss defines no gradient of one "
            'sample. Choose batchnorm="rows" (each sample\'s rows of the ordinary '
            'backward pass) or batchnorm="frozen" (batch statistics as constants), '
            "call model.eval(), or use MinibatchVariance."
        )

    def _mixed_message(self, tape: Tape, i: int, batch: int) -> str:
        where = self._module_at(tape, i)
        return (
            f"The rows of {tape.names[i]} at {where} (shape {tape.shapes(i)[0]}) do "
            f"not each belong to one of the {batch} samples: a layer after it mixes "
            "samples, or the losses do. Leave the mixing layer out, or use "
            "MinibatchVariance. (In float16, gradients so small that they round do not "
            "scale either: multiply the loss and pass scale=.)"
        )

    def _module_at(self, tape: Tape, i: int) -> str:
        for edge in tape.children[i]:
            if edge is not None and tape.names[edge[0]].startswith("leaf "):
                parameter = tape.names[edge[0]][5:]
                return self._modules.get(parameter, parameter)
        below = _nearest_parameter(tape, i)
        return f"{tape.names[i]}" + (f" above {below!r}" if below else "")


def _is_sure(measured: list[Measurement | None], batch: int) -> bool:
    """Whether one layout alone fits what was measured, and all samples were seen."""
    return all(
        m is None or (len(m.layouts(batch)) == 1 and m.shows_all(batch))
        for m in measured
    )


def _nearest_parameter(tape: Tape, i: int) -> str | None:
    queue, entered = [i], {i}
    for j in queue:
        if tape.names[j].startswith("leaf "):
            return tape.names[j][5:]
        for edge in tape.children[j]:
            if edge is not None and edge[0] not in entered:
                entered.add(edge[0])
                queue.append(edge[0])
    return None


def _refuse_compiled(tape: Tape) -> None:
    for name in tape.names:
        if name.startswith("CompiledFunction"):
            raise CaptureError(
                "The loss was computed by a region compiled with torch.compile, which "
                "is one opaque node here. Probe the uncompiled module (for a compiled "
                "`fast = torch.compile(model)`, run `model` itself) on the steps that "
                "you probe."
            )


def _refuse_complex(tape: Tape) -> None:
    for i, node in enumerate(tape.nodes):
        if any(meta.dtype.is_complex for meta in node._input_metadata):
            raise CaptureError(
                f"The loss computes with complex numbers ({tape.names[i]}), which are "
                "not supported; write that part with real ones, as in a matrix product "
                "with cosines and sines."
            )


def _refuse_nested(tape: Tape) -> None:
    for i, node in enumerate(tape.nodes):
        if any(meta.is_nested_tensor for meta in node._input_metadata):
            raise CaptureError(
                f"The loss computes with nested tensors ({tape.names[i]}), which are "
                "not supported; run the model on padded ones."
            )


def _all_of_one(shapes: Sequence[tuple[int, ...]]) -> list[RowLayout | None]:
    """Layouts of a batch of one: all rows belong to the sample."""
    scalar = IrregularLayout(torch.zeros((), dtype=torch.long), 1)
    return [RegularLayout(0, 1, 1, s[0]) if s else scalar for s in shapes]


def _views_of(tape: Tape, i: int) -> list[int]:
    """Nodes that view the one output of node `i` in another shape."""
    if len(tape.shapes(i)) > 1:
        return []
    return [parent for parent, _, _ in tape.parents[i] if tape.names[parent] in VIEWS]


def _like_views(
    found: list[RowLayout],
    tape: Tape,
    i: int,
    measured: Mapping[int, list[Measurement | None]],
    batch: int,
) -> list[RowLayout]:
    """Those of several layouts that also fit where the output is viewed otherwise.

    Where only the first of T tokens is seen, as before a classifier, rows [B * T] fit
    two layouts if T is one more than a multiple of B; rows [B, T] fit one.
    """
    shape = tape.shapes(i)[0]
    for view in _views_of(tape, i):
        seen = measured[view][0]
        if seen is None:
            continue
        fitting = [x for x in seen.layouts(batch) if isinstance(x, RegularLayout)]
        strides = {x.stride(seen.shape) for x in fitting}
        common: list[RowLayout] = [
            x
            for x in found
            if isinstance(x, RegularLayout) and x.stride(shape) in strides
        ]
        found = common or found
    return found


def _with_routed(
    tape: Tape, plan: Plan, layouts: Layouts, routes: Routes | None, batch: int
) -> Layouts | None:
    """Complete layouts; None where the routes of this graph do not agree."""
    if routes is None:
        return layouts
    labels = routes.labels(tape)
    if labels is None:
        return None
    return [
        routes.layouts(tape, labels, use.node, batch)
        if use.node in routes.nodes
        else of_use
        for use, of_use in zip(plan.uses, layouts, strict=True)
    ]


def _signature(tape: Tape, known: _Known, batch: int) -> tuple:
    """All by which two graphs of one structure can differ in their layouts."""
    plan = known.plan
    shapes = tuple(
        () if use.node in known.routed else of_use
        for use, of_use in zip(plan.uses, plan.signature(tape), strict=True)
    )
    numbers = read_numbers(tape, known.placing)
    return batch, shapes, plan.entrances(tape), numbers


def _carried_over(known: _Known, signature: tuple) -> Layouts | None:
    _, old_shapes, old_entrances, old_numbers = known.measured[0]
    batch, new_shapes, entrances, numbers = signature
    if numbers != old_numbers or [[size == 1 for size in e] for e in entrances] != [
        [size == 1 for size in e] for e in old_entrances
    ]:
        return None
    layouts: Layouts = []
    for of_use, old, new in zip(
        known.layouts[known.measured[0]], old_shapes, new_shapes, strict=True
    ):
        moved: list[RowLayout | None] = []
        for layout, was, now in zip(of_use, old, new, strict=True):
            if layout is None:
                moved.append(None)
                continue
            assert isinstance(layout, RegularLayout)
            carried = layout.transfer(was, now, batch)
            if carried is None:
                return None
            moved.append(carried)
        layouts.append(moved)
    return layouts


def _owners(model: nn.Module) -> dict[str, str]:
    """Name of the module that owns each parameter, for messages."""
    owners = {}
    for module_name, module in model.named_modules():
        for key, _ in module.named_parameters(recurse=False):
            full = f"{module_name}.{key}" if module_name else key
            owners[full] = f"{module_name or 'the model'} ({type(module).__name__})"
    return owners
