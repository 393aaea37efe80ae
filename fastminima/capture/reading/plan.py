"""Where each parameter is used: the first nodes above it that meet data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Size, Tensor

from ..graph.nodes import (
    BROADCASTING,
    ELEMENTWISE,
    EMBEDDING,
    FACTORS,
    PRODUCTS,
    REARRANGING,
)
from ..graph.saved import saved_tensor
from ..graph.tape import Tape
from ..rows.evidence import Evidence
from ..rows.layout import RegularLayout

__all__ = [
    "Layouts",
    "Path",
    "Plan",
    "Slot",
    "Use",
    "find_plan",
    "is_spread",
    "reads_data",
    "watched_nodes",
]

# Of each use, of each of its outputs: a RowLayout, None where no gradient comes, or a
# SegmentLayout, which becomes a RowLayout in each step.
Layouts = dict[int, tuple[Any, ...]]
Step = tuple[int, int, int]  # node, output its gradient enters by, input it leaves by


@dataclass(frozen=True)
class Path:
    """How a parameter arrives at a use: the preparations between them, use first.

    `steps` is None when they are more than a chain of rearrangements (which may end in
    one look-up of a table).
    """

    parameter: str
    steps: tuple[Step, ...] | None
    leaf: int  # the node where the gradient ends
    is_copy: bool  # of the parameter, as a region is given it


@dataclass(frozen=True)
class Slot:
    """One input of a use through which parameters enter."""

    number: int
    child: tuple[int, int]  # the input is this node's output number ...
    shape: tuple[int, ...] = field(compare=False)  # may differ from step to step
    paths: tuple[Path, ...]
    is_alone: bool = False  # no parameter enters anywhere else

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters that enter here."""
        return [path.parameter for path in self.paths]


@dataclass(frozen=True)
class Use:
    """A node where parameters meet data."""

    node: int
    name: str
    slots: tuple[Slot, ...]

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters that enter here."""
        return [name for slot in self.slots for name in slot.parameters]


class Plan:
    """The uses in a graph. It holds node numbers only, so it outlives the graph.

    Attributes:
        uses: every node where tracked parameters meet data.
        sources: for each parameter, how many slots it and copies of it enter by.
        own: the parameters that enter themselves.
        preparing: nodes fed by parameters alone, above which the uses are.
        hidden: parameters that are prepared for a region that has its own graph.
    """

    def __init__(
        self,
        uses: tuple[Use, ...],
        preparing: frozenset[int],
        hidden: frozenset[str] = frozenset(),
    ) -> None:
        self.uses = uses
        self.hidden = hidden
        self.preparing = preparing
        self.entering = [slot.child for use in uses for slot in use.slots]
        self.sources: dict[str, int] = {}
        self.own: set[str] = set()
        for path in (p for use in uses for slot in use.slots for p in slot.paths):
            self.sources[path.parameter] = self.sources.get(path.parameter, 0) + 1
            if not path.is_copy:
                self.own.add(path.parameter)

    def signature(self, tape: Tape) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Shapes of all output gradients that the plan reads."""
        return tuple([tuple(tape.shapes(use.node)) for use in self.uses])

    def sized(self, tape: Tape) -> Plan:
        """This plan with the shapes that parameters have in a graph."""
        uses = []
        for use in self.uses:
            shapes = [tape.shapes(s.child[0])[s.child[1]] for s in use.slots]
            if all(
                s.shape == shape for s, shape in zip(use.slots, shapes, strict=True)
            ):
                uses.append(use)
                continue
            slots = zip(use.slots, shapes, strict=True)
            sized = tuple(replace(slot, shape=shape) for slot, shape in slots)
            uses.append(replace(use, slots=sized))
        return Plan(tuple(uses), self.preparing)

    def entrances(self, tape: Tape) -> tuple[tuple[int, ...], ...]:
        """Shapes in which parameters enter: they may be given others."""
        return tuple([tape.shapes(i)[output] for i, output in self.entering])


def watched_nodes(tape: Tape, regions: Container[int] = ()) -> list[int]:
    """Nodes whose rows tell uses from preparations: all near a tracked parameter.

    `regions` have graphs of their own and are no uses.
    """
    side = tape.is_parameter_side
    prepared = tape.above(
        *tape.parameter_at, enters=lambda i: side[i] and i not in regions
    )
    near = {
        parent
        for i in (*tape.parameter_at, *prepared)
        for parent, _, _ in tape.parents[i]
        if parent not in regions
    }
    return sorted(i for i in near if not (side[i] and tape.names[i] in REARRANGING))


def find_plan(
    tape: Tape, evidence: Evidence | None, regions: Container[int] = ()
) -> Plan:
    """Find the first node above each parameter that meets data.

    A node fed by leaves alone is a preparation (weight norm, `1 + w`, a table looked up
    once for all samples) when its output gradient mixes samples, and a use when each of
    its rows belongs to one sample. There is no `evidence` for a batch of one, where
    every row belongs to the one sample and any such node may count as a use. A
    parameter that is prepared for one of the `regions` is `hidden`.
    """
    arrivals: dict[tuple[int, int], tuple[tuple[int, int], dict]] = {}
    preparing: set[int] = set()
    several: set[int] = set()
    hidden: set[str] = set()
    for leaf, parameter in tape.parameter_at.items():
        stack: list[tuple[int, int | None, tuple[Step, ...]]] = [(leaf, None, ())]
        met: set[int] = set()
        while stack:
            i, leaves_by, below = stack.pop()
            for parent, number, output in tape.parents[i]:
                if parent in regions:
                    if leaves_by is not None:
                        hidden.add(parameter)
                    continue
                steps = below if leaves_by is None else ((i, output, leaves_by), *below)
                if _is_preparation(tape, parent, evidence):
                    preparing.add(parent)
                    if parent in met:  # several ways: none of them is a simple chain
                        several.add(leaf)
                    else:
                        met.add(parent)
                        stack.append((parent, number, steps))
                    continue
                _, chains = arrivals.setdefault((parent, number), ((i, output), {}))
                chains.setdefault(leaf, []).append(steps)
    entered = Counter(leaf for _, chains in arrivals.values() for leaf in chains)
    slots: dict[int, list[Slot]] = {}
    for (node, number), (child, chains) in sorted(arrivals.items()):
        paths = tuple(
            Path(
                tape.parameter_at[leaf],
                None
                if leaf in several and found != [()]
                else _simple(tape, found, alone=len(chains) == 1),
                leaf,
                is_copy=leaf in tape.copies,
            )
            for leaf, found in chains.items()
        )
        shape = tape.shapes(child[0])[child[1]]
        alone = all(entered[leaf] == 1 for leaf in chains)
        slots.setdefault(node, []).append(Slot(number, child, shape, paths, alone))
    uses = (Use(node, tape.names[node], tuple(s)) for node, s in slots.items())
    return Plan(tuple(uses), frozenset(preparing), frozenset(hidden))


def reads_data(tape: Tape, i: int, own: Container[int]) -> bool:
    """Whether a node fed by leaves also reads a tensor that is not the model's own.

    Then it is no preparation of a parameter: it met data, and a layer further on mixed
    the samples. `own` has the storages (`_cdata`) of parameters and buffers.
    """
    name, node = tape.names[i], tape.nodes[i]
    if name in REARRANGING:
        return False
    if name == EMBEDDING:
        ids = saved_tensor(node, "_saved_indices")
        return ids.dim() > 1 and len(ids) > 1
    product = PRODUCTS.get(name)
    operands = FACTORS.get(name, ()) if product is None else product.operands
    for number, edge in enumerate(tape.children[i]):
        if edge is not None:
            continue
        operand = operands[number] if number < len(operands) else None
        tensor = saved_tensor(node, f"_saved_{operand}") if operand else None
        if isinstance(tensor, Tensor):
            is_own = tensor.untyped_storage()._cdata in own
            is_small = name in FACTORS and not _is_larger(tape, i)
            if tensor.numel() > 1 and not (is_own or is_small):
                return True
        elif _is_larger(tape, i):
            return True
    return False


_SPREADING = REARRANGING | BROADCASTING | ELEMENTWISE


def is_spread(tape: Tape, plan: Plan, layouts: Layouts, i: int) -> bool:
    """Whether node `i` looks up rows that meet all samples as one and the same thing.

    So do relative positions, whatever numbers they were looked up with: nothing but
    rearrangements and what computes element by element come in between, and at each use
    the operand has size one along the dim of the samples.
    """
    if tape.names[i] != EMBEDDING:
        return False
    spread = {
        (use.node, slot.number)
        for use in plan.uses
        for layout in layouts[use.node][:1]
        for slot in use.slots
        if use.name in BROADCASTING
        and isinstance(layout, RegularLayout)
        and _is_one_along(slot.shape, layout.dim - len(tape.shapes(use.node)[0]))
    }
    above = list(tape.above(i, enters=lambda j: j in plan.preparing))
    if any(tape.names[j] not in _SPREADING for j in above):
        return False
    return all(
        parent in plan.preparing or (parent, number) in spread
        for j in (i, *above)
        for parent, number, _ in tape.parents[j]
    )


def _is_one_along(shape: tuple[int, ...], dim: int) -> bool:
    """Whether an operand has size one along a dim counted from the last."""
    return len(shape) < -dim or shape[dim] == 1


def _is_larger(tape: Tape, i: int) -> bool:
    """Whether the output is larger than every input that is in the graph."""
    sizes = [Size(tape.shapes(e[0])[e[1]]).numel() for e in tape.children[i] if e]
    return Size(tape.shapes(i)[0]).numel() > max(sizes)


def _is_preparation(tape: Tape, i: int, evidence: Evidence | None) -> bool:
    if not tape.is_parameter_side[i] or not tape.parents[i]:
        return False
    if tape.names[i] in REARRANGING:
        return True
    return evidence is not None and evidence.is_mixed(i)


def _simple(
    tape: Tape, chains: list[tuple[Step, ...]], *, alone: bool
) -> tuple[Step, ...] | None:
    if not alone or len(chains) > 1:
        return None
    (steps,) = chains
    names = [tape.names[node] for node, _, _ in steps]
    if names and names[-1] == EMBEDDING:
        names.pop()
    return steps if all(name in REARRANGING for name in names) else None
