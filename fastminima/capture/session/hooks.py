"""One backward pass under observation: hooks in, contributions out, hooks gone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..._dtypes import accumulation_dtype
from ...ops import multi
from ..contributions import (
    Contribution,
    ConvolutionBias,
    Dense,
    DenseBias,
    Embedding,
    Placed,
    Pushed,
    joined,
)
from ..errors import CaptureError
from ..graph.nodes import EMBEDDING, KEEPING_ORDER, ROUNDING, TRANSPOSING, is_scaled
from ..graph.passes import nobodys, owner_of_pass
from ..graph.saved import readable, saved_tensor
from ..graph.tape import Tape, signed
from ..graph.undisturbed import undisturbed
from ..reading.plan import Path, Plan, Slot, Use
from ..reading.reader import Reading
from ..reading.regions import Region, Watcher, is_reentrant, watch
from ..rows.layout import RowLayout
from ..rules import contributions_of
from ..rules.universal import Universal
from .arrival import Arrival
from .fused import Fusion
from .single_rows import RowUse

__all__ = ["Collected", "Session", "dense_values"]

_NORMS = frozenset(["norms"])
_BIASES = (DenseBias, ConvolutionBias)
_Delivery = Callable[[Contribution], Contribution]


@dataclass
class Collected:
    """What the hooks of one pass gathered, still in units of that pass' gradient."""

    sq_norms: dict[str, Tensor] = field(default_factory=dict)
    second_moments: dict[str, Tensor] = field(default_factory=dict)
    gram: Tensor | None = None
    dots: dict[str, Tensor] = field(default_factory=dict)
    totals: dict[str, Tensor] = field(default_factory=dict)  # sum over samples of g_n
    grad_sq_norms: list[Tensor] = field(default_factory=list)  # add up to |grad|^2
    grads: dict[str, Tensor] = field(default_factory=dict)
    rules: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # spent on the norms

    def spent(self, names: Sequence[str], seconds: float) -> None:
        """Note time spent on the statistics of some parameters together."""
        for name in names:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds / len(names)


class Session:
    """Hooks on the uses of one graph; what they see ends up in `collected`.

    Args:
        measure: any of "norms", "second_moments", "gram", "totals"; with the last one
            rules are noted and the norms are timed too.
        directions: `{name: {parameter: tensor}}`.
        keep_grads: keep this pass' gradient itself.
        hook_gradients: read the gradient when it is about to be accumulated, for
            passes after which nobody calls `take_gradients`.
        defer_errors: let the pass go on after a CaptureError and raise it in `finish`:
            other ranks wait for this one's gradients.
        fusion: the gradients that this pass leaves out and that are made here.
        arrival: of the loss, where the pass is not run by the probe itself: only what
            comes by it counts.
        owner: of the passes that are run for it, where that is not the session itself.
        announce: called with a message the first time a node has no rule.
    """

    def __init__(
        self,
        reading: Reading,
        parameters: Mapping[str, Tensor],
        batch: int,
        *,
        measure: frozenset[str],
        directions: Mapping[str, Mapping[str, Tensor]],
        keep_grads: bool,
        hook_gradients: bool,
        defer_errors: bool = False,
        fusion: Fusion | None = None,
        arrival: Arrival | None = None,
        owner: object = None,
        announce: Callable[[str, Sequence[str]], None],
    ) -> None:
        self._arrival = arrival
        self._owner = owner
        self._has_inner_passes = bool(reading.found.regions)
        self._separated: set[str] = set()
        self._taken: set[str] = set()
        self._uses_seen: dict[str, list[str]] = {}
        self._defer_errors = defer_errors
        self._error: CaptureError | None = None
        self.collected = Collected()
        self._parameters = parameters
        self._batch = batch
        self._measure = measure
        self._directions = directions
        self._keep_grads = keep_grads
        self._fusion = fusion
        self._announce = announce
        found = reading.found
        self._missing = dict(found.plan.sources)
        self._split: set[str] = set()
        if found.regions:
            self._add_regions(reading)
        self._parts: dict[str, Tensor] = {}
        self._accumulators: dict[str, Any] = {}
        self._reads_gradients = hook_gradients
        self._waiting: dict[str, list[Contribution]] = {}
        self._handles: list[Any] = []
        try:
            rows = self._row_uses(reading)
            self._hook_graph(reading.tape, found.plan, found.layouts, rows)
            for i, region in found.regions.items():
                node = reading.tape.nodes[i]
                self._handles.append(watch(node, self._region_watcher(region), self))
            if hook_gradients:
                self._hook_gradients(reading.tape)
        except BaseException:
            self.close()
            raise

    def _add_regions(self, reading: Reading) -> None:
        """Expect what comes from the graphs of regions too."""
        found = reading.found
        plans = [found.plan, *(r.plan for r in found.regions.values() if r)]
        self._missing = _added(plan.sources for plan in plans)
        # A parameter whose gradient comes from several graphs gets it in parts.
        arrivals = [
            set(reading.tape.leaves),
            *(
                region.plan.own
                for i, region in found.regions.items()
                if region is not None and is_reentrant(reading.tape.nodes[i])
            ),
        ]
        self._split = {n for n in self._missing if sum(n in a for a in arrivals) > 1}

    def close(self) -> None:
        """Remove every hook and let go of what waits."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._waiting.clear()
        self._accumulators.clear()

    def finish(self) -> Collected:
        """Complete the parameters some of whose uses got no gradient; remove hooks."""
        if self._error is not None:
            self.close()
            raise self._error
        with undisturbed():
            for name, parts in self._waiting.items():
                self._complete(name, joined(parts))
            self.take_gradients(self._parts)
        self.close()
        return self.collected

    @property
    def owner(self) -> object:
        """Whom the passes belong to that are run for this session."""
        return self if self._owner is None else self._owner

    def _is_anothers(self) -> bool:
        """Whether the pass that calls this is not the one that is observed."""
        owner = owner_of_pass()
        if owner is not None:
            return owner is not self.owner
        arrival = self._arrival
        return arrival is not None and not arrival.is_on(
            by_task=not self._has_inner_passes
        )

    def _is_late(self, name: str) -> bool:
        """Whether a gradient comes after the pass, which left it out.

        As of a probe in fused mode that runs the pass.
        """
        is_over = self._arrival is not None and self._arrival.is_on(by_task=False)
        return is_over and owner_of_pass() is None and name not in self._taken

    def separate(self, tape: Tape, names: Iterable[str]) -> None:
        """Read some parameters' gradients where they leave this graph, from now on.

        Something else in the pass, such as a penalty on weights, has gradients for
        them too.
        """
        for name in names:
            self._separated.add(name)
            shape = self._parameters[name].shape
            for parent, number, _ in tape.parents[tape.leaves[name]]:
                hook = self._edge_hook(name, number, shape)
                self._handles.append(tape.nodes[parent].register_hook(hook))

    def _edge_hook(
        self, name: str, number: int, shape: torch.Size
    ) -> Callable[[Any, Any], None]:
        def hook(grad_inputs: tuple[Tensor | None, ...], _: Any) -> None:
            grad = grad_inputs[number]
            if grad is None or self._is_anothers():
                return
            with undisturbed():
                if grad.shape != shape:
                    grad = grad.sum_to_size(shape)
                sofar = self._parts.get(name)
                self._parts[name] = grad.clone() if sofar is None else sofar + grad

        return hook

    def _row_uses(self, reading: Reading) -> Mapping[int, RowUse]:
        is_norms_only = self._measure == _NORMS and not self._directions
        if not is_norms_only or self._defer_errors or reading.found.routes:
            return {}
        return reading.found.row_uses(reading.tape)

    def _hook_graph(
        self,
        tape: Tape,
        plan: Plan,
        layouts: Sequence[Sequence[RowLayout | None]],
        rows: Mapping[int, RowUse] = MappingProxyType({}),
    ) -> None:
        for use, use_layouts in zip(plan.uses, layouts, strict=True):
            row = rows.get(use.node)
            if row is None:
                self._hook_use(tape, use, use_layouts)
            else:
                self._hook_rows(tape, use, use_layouts, row)

    def _hook_rows(
        self,
        tape: Tape,
        use: Use,
        layouts: Sequence[RowLayout | None],
        row: RowUse,
    ) -> None:
        node = tape.nodes[use.node]
        if is_scaled(node, use.name):
            self._hook_use(tape, use, layouts)
            return

        def hook(grads: tuple[Tensor | None, ...]) -> None:
            g = grads[0]
            if g is None or self._is_anothers():
                return
            with undisturbed():
                norms = row.norms(torch._C._current_autograd_node(), g)
            for name in norms:
                self._count(name, use.name)
            self.collected.sq_norms |= norms

        self._handles.append(node.register_prehook(hook))

    def _hook_gradients(self, tape: Tape) -> None:
        """Read the gradients of the parameters that are leaves of this graph."""
        for name, i in tape.leaves.items():
            if name not in self._missing:  # unused, or a copy given to a region
                continue
            node = tape.nodes[i]
            if self._accumulators.get(name) is not node:  # one for all graphs alive
                self._accumulators[name] = node
                hook = self._gradient_hook(name)
                self._handles.append(node.register_prehook(hook))

    def _region_watcher(self, region: Region | None) -> Watcher:
        names = {id(p): name for name, p in self._parameters.items()}

        def watcher(
            inputs: Sequence[Tensor], outputs: Sequence[Tensor]
        ) -> list[Tensor]:
            if region is None:
                raise CaptureError(
                    "A gradient reached a region that runs again in the backward pass "
                    "where none came when its rows were measured. Make a new probe."
                )
            tape = region.read(inputs, outputs, names)
            self._hook_graph(tape, region.plan.sized(tape), region.layouts)
            if self._reads_gradients:
                self._hook_gradients(tape)
            # All of them: a node that rules call gives nothing that nobody asked for.
            paths = (p for u in region.plan.uses for s in u.slots for p in s.paths)
            leaves = dict.fromkeys((path.parameter, path.is_copy) for path in paths)
            return [tape.leaf(name, is_copy=is_copy) for name, is_copy in leaves]

        return watcher

    def _hook_use(
        self, tape: Tape, use: Use, layouts: Sequence[RowLayout | None]
    ) -> None:
        # The closure holds the nodes between use and leaf, never the use itself: a
        # cycle through the graph would keep it alive until the garbage collector runs.
        deliver = [
            (slot.number, path, self._delivery(tape, slot, path))
            for slot in use.slots
            for path in slot.paths
        ]

        def hook(grads: tuple[Tensor | None, ...]) -> None:
            if all(g is None for g in grads) or self._is_anothers():
                return
            node = readable(torch._C._current_autograd_node())
            try:
                with undisturbed():
                    self._visit(use, node, grads, layouts, deliver)
            except CaptureError as error:
                if not self._defer_errors:
                    raise
                self._error = self._error or error

        self._handles.append(tape.nodes[use.node].register_prehook(hook))

    def _visit(
        self,
        use: Use,
        node: Any,
        grads: Sequence[Tensor | None],
        layouts: Sequence[RowLayout | None],
        deliver: Sequence[tuple[int, Path, _Delivery | None]],
    ) -> None:
        for grad, layout in zip_longest(grads, layouts):
            if grad is not None and layout is None:
                raise CaptureError(
                    f"A gradient of shape {tuple(grad.shape)} reached {use.name} "
                    f"(parameters {use.parameters}) where none came when its rows were "
                    "measured. Make a new probe; report it if that does not help."
                )
        started = self._clock(grads)
        found = contributions_of(use.name, node, grads, layouts, use.slots)
        rest = [slot for slot in use.slots if slot.number not in found]
        if rest:
            self._announce(use.name, [p.parameter for s in rest for p in s.paths])
            found |= Universal(node, grads, layouts, self._batch).contributions(rest)
        if "totals" in self._measure:
            spent = self._clock(grads) - started
            self.collected.spent(use.parameters, spent)
        if len(deliver) > 1:
            # Weights first: they may compute their bias' norms in the same pass.
            deliver = sorted(deliver, key=lambda d: isinstance(found[d[0]], _BIASES))
        for number, path, delivered in deliver:
            part = found[number]
            part = part if delivered is None else delivered(part)
            self._arrive(path.parameter, part, use.name)
        if "totals" in self._measure:
            universal = {slot.number for slot in rest}
            for number, path, _ in deliver:
                rule = "universal" if number in universal else use.name
                name = path.parameter
                self.collected.rules.setdefault(name, []).append(rule)

    def _count(self, name: str, use: str) -> None:
        """Note that one of the uses of a parameter was seen."""
        self._missing[name] -= 1
        seen = self._uses_seen.setdefault(name, [])
        seen.append(use)
        if self._missing[name] < 0:
            raise CaptureError(
                f"Parameter {name!r} got gradients from more uses than the graph had "
                f"when it was read ({len(seen) - 1}): from {', '.join(seen)}. "
                + (
                    "A node ran twice: the loss was differentiated by two calls of "
                    "backward, or a hook called backward inside this one."
                    if self._arrival is None
                    else "The graph changed between attach and backward, or the pass "
                    "ran part of it twice. Attach to the very loss that is "
                    "differentiated, right before backward."
                )
            )

    def _arrive(self, name: str, contribution: Contribution, use: str) -> None:
        self._count(name, use)
        waiting = self._waiting.pop(name, None)
        if self._missing[name] > 0:
            self._waiting[name] = [*(waiting or ()), contribution.settled()]
        elif waiting is None:
            self._complete(name, contribution)
        else:
            self._complete(name, joined([*waiting, contribution]))

    def _fuse(self, fusion: Fusion, name: str, whole: Contribution) -> None:
        """The statistics of a parameter together with its gradient."""
        into = self.collected
        found = whole.fused(with_second_moment="second_moments" in self._measure)
        into.sq_norms[name] = found.sq_norms
        if found.second_moment is not None:
            into.second_moments[name] = found.second_moment
        fusion.add(name, found.total)

    def _complete(self, name: str, whole: Contribution) -> None:
        into = self.collected
        if self._fusion is not None and name in self._fusion.names:
            self._fuse(self._fusion, name, whole)
            self._add_dots(name, whole)
            return
        if "gram" in self._measure:
            gram = whole.gram()
            into.sq_norms[name] = gram.diagonal().clone()
            into.gram = gram if into.gram is None else into.gram + gram
        else:
            started = self._clock()
            into.sq_norms[name] = norms = whole.sq_norms()
            if "totals" in self._measure:
                into.spent([name], self._clock([norms]) - started)
        if "second_moments" in self._measure:
            into.second_moments[name] = whole.second_moment()
        if "totals" in self._measure:
            into.totals[name] = whole.total()
        self._add_dots(name, whole)

    def _add_dots(self, name: str, whole: Contribution) -> None:
        into = self.collected
        for direction, parts_of in self._directions.items():
            if name in parts_of:
                dots = whole.dots(parts_of[name])
                sofar = into.dots.get(direction)
                into.dots[direction] = dots if sofar is None else sofar + dots

    def _clock(self, tensors: Sequence[Tensor | None] = ()) -> float:
        """Seconds, once the device has done what it was told; 0 where nobody asks."""
        if "totals" not in self._measure:
            return 0.0
        for device in {t.device for t in tensors if t is not None and t.is_cuda}:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def _gradient_hook(self, name: str) -> Callable[[tuple[Tensor | None, ...]], None]:
        def hook(grads: tuple[Tensor | None, ...]) -> None:
            grad = grads[0]
            if grad is None or name in self._separated:
                return
            if self._is_anothers() and not self._is_late(name):
                return
            self._taken.add(name)
            with undisturbed():
                if name in self._split:
                    sofar = self._parts.get(name)
                    self._parts[name] = grad.clone() if sofar is None else sofar + grad
                else:
                    self.take_gradients({name: grad})

        return hook

    def take_gradients(self, grads: Mapping[str, Tensor]) -> None:
        """Note the gradients of some parameters in this pass."""
        values = []
        for name, grad in grads.items():
            values.append(dense_values(grad))
            if self._keep_grads:
                kept = grad.to_dense() if grad.is_sparse else grad.clone()
                self.collected.grads[name] = kept
        if values:
            dtype = accumulation_dtype(values[0].dtype)
            self.collected.grad_sq_norms.append(multi.multi_sq_norm(values).to(dtype))

    def _delivery(self, tape: Tape, slot: Slot, path: Path) -> _Delivery | None:
        """How a contribution to a slot becomes one to the parameter behind it.

        None where it is one already.
        """
        if path.steps == ():
            return None
        parameter = tape.leaf(path.parameter, is_copy=path.is_copy)
        shape = tuple(parameter.shape)
        if path.steps is None:
            edge = GradientEdge(tape.nodes[slot.child[0]], slot.child[1])
            return lambda inner: Pushed(inner, shape, _pusher(edge, parameter))
        names = [tape.names[node] for node, _, _ in path.steps]
        nodes = [tape.nodes[node] for node, _, _ in path.steps]
        if names[-1] == EMBEDDING:
            return _table_delivery(nodes, names, slot, shape, parameter)
        moves = [name for name in names if name != ROUNDING]
        if not moves:  # contributions are in the accumulation dtype anyway
            return None
        is_transpose = len(moves) == 1 and moves[0] in TRANSPOSING
        steps = path.steps
        span = _span(nodes[-1], names[-1], steps[-1][1])

        def placed(inner: Contribution) -> Contribution:
            if is_transpose and isinstance(inner, Dense):
                return inner.transpose_()
            return Placed(inner, shape, _placer(nodes, names, steps), span)

        return placed


def _span(node: Any, name: str, output: int) -> tuple[int, int] | None:
    """Which rows of the parameter itself a node takes, where it takes some."""
    dim = getattr(node, "_saved_dim", None)
    if not isinstance(dim, int) or signed(dim) != 0:
        return None
    if name == "SelectBackward0":
        index = signed(node._saved_index)
        return (index, index + 1) if index >= 0 else None
    if name == "UnbindBackward0":
        return output, output + 1
    if name == "SplitBackward0":
        size = node._saved_split_size
        return output * size, (output + 1) * size
    if name == "SplitWithSizesBackward0":
        sizes = node._saved_split_sizes
        return sum(sizes[:output]), sum(sizes[: output + 1])
    if name == "SliceBackward0" and node._saved_step == 1:
        start, end = signed(node._saved_start), signed(node._saved_end)
        return (start, end) if 0 <= start <= end else None
    return None


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in counts:
        for name, count in part.items():
            total[name] = total.get(name, 0) + count
    return total


def dense_values(grad: Tensor) -> Tensor:
    """A dense tensor with the elements of a gradient that may be sparse."""
    if grad.layout == torch.strided:
        return grad
    return grad.coalesce().values() if grad.is_sparse else grad.to_dense()


def _table_delivery(
    nodes: list[Any],
    names: list[str],
    slot: Slot,
    shape: tuple[int, ...],
    parameter: Tensor,
) -> _Delivery:
    """A table looked up once for all samples: the ids are the same in each."""
    table = nodes[-1]
    in_order = all(name in KEEPING_ORDER for name in names[:-1])
    edge = GradientEdge(nodes[0], 0)

    def delivered(inner: Contribution) -> Contribution:
        if not in_order or table._saved_scale_grad_by_freq:
            return Pushed(inner, shape, _pusher(edge, parameter))
        ids = saved_tensor(table, "_saved_indices").flatten()
        rows = inner.per_sample(0, inner.batch)
        rows = rows.reshape(inner.batch, len(ids), shape[1])
        ids = ids.expand(inner.batch, -1)
        return Embedding(ids, rows, signed(table._saved_padding_idx), shape[0])

    return delivered


def _pusher(edge: GradientEdge, parameter: Tensor) -> Callable[[Tensor], Tensor]:
    def push(grad: Tensor) -> Tensor:
        with nobodys(edge.node):
            (pushed,) = torch.autograd.grad(
                edge, parameter, grad.to(_dtype_of(edge)), retain_graph=True
            )
        return pushed

    return push


def _dtype_of(edge: GradientEdge) -> torch.dtype:
    return edge.node._input_metadata[edge.output_nr].dtype


def _placer(
    nodes: list[Any], names: list[str], steps: Sequence[tuple[int, int, int]]
) -> Callable[[Tensor], Tensor]:
    chain = [
        (node, len(node._input_metadata), output, number)
        for node, name, (_, output, number) in zip(nodes, names, steps, strict=True)
        if name != ROUNDING
    ]

    def place(t: Tensor) -> Tensor:
        for node, outputs, output, number in chain:
            grads: list[Tensor | None] = [None] * outputs
            grads[output] = t
            moved = node(*grads)
            t = moved[number] if isinstance(moved, tuple) else moved
        return t

    return place
