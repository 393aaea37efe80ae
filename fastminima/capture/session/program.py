"""What is done with the gradients of a known graph: decided once, run in every step.

The generic way asks each use anew for its rule, its contributions, their way to the
parameters. Where the recipe of a graph says the layout, the kernel and where the result
goes, all of that is one *step* of a program, which the extension runs: a hook in C++
reads the gradient and what the node has saved, checks that they are what the step was
made for, and calls the kernel, which writes into a row of the pass' table.

    addmm(bias [20], x [N, 10], weight.t()), one row a sample
    -> single rows of "_saved_mat1":  |g_n|^2 |x_n|^2  and  |g_n|^2, to two rows

Where there is no such kernel (other devices, half precision, convolutions) the hook
hands the tensors to a function, which calls the op. Any other use is taken by its rule,
and so is one whose step does not fit (another dtype, strides that no kernel reads, a
checkpoint): that gives the same bits and serves everything, such as parameters that are
used several times, or changed on their way. Which step a use gets says `steps.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ... import _native
from ...ops._arguments import NATIVE, SUFFIX
from ..graph.extension import learned
from ..graph.node import Node
from ..graph.tape import Tape
from ..reading.plan import Use
from ..reading.reader import Reading
from .arrival import PassFilter
from .called import Called, Launched, new_table
from .delivery import Deliveries, deliveries_from
from .fused_steps import add_fused
from .making import Making
from .norms import NormTable, new_numbers
from .steps import add_step
from .tied import Part, add_tied, tied_halves

__all__ = ["Program", "program_of"]


@dataclass(frozen=True)
class Program:
    """The steps of a recipe. It holds names and numbers, and no node.

    Attributes:
        steps: as the extension has them.
        uses: what each of them is for, in the same order.
        rows: of the table, for each parameter that the graph reaches.
        dtype: of the table, and of all that kernels read; None where all is called.
        calls: what takes the gradient and the saved tensors of a node, where it is not
            a kernel; gives the norms by parameter.
        launched: of these, what the extension launches.
        device: of the first use.
        parts: of nodes that are computed two by two, what each alone contributes.
        in_order: nodes of uses whose parameters are used only there, rearranged at
            most, which changes no norm.
        kernels: nodes of the steps that fill rows of the table.
        names: of the nodes between uses and parameters.
    """

    steps: Any
    uses: tuple[Use, ...]
    rows: Mapping[str, int]
    dtype: torch.dtype | None
    calls: Mapping[int, Called]
    launched: Launched
    device: torch.device
    parts: Mapping[int, Part]
    in_order: frozenset[int]
    kernels: frozenset[int]
    names: Mapping[int, str]

    @cached_property
    def use_at(self) -> dict[int, Use]:
        """The use of each node that has a step."""
        return {use.node: use for use in self.uses}

    def start(
        self, session: Any, batch: int, of_pass: PassFilter | None = None
    ) -> tuple[Any, NormTable | None]:
        """A pass of the extension's, and the table that it fills, if it fills one.

        Args:
            session: called where the pass needs Python; referenced weakly.
            batch: samples.
            of_pass: tells the pass that is observed from others; None where the probe
                itself runs it and nothing inside belongs to it.
        """
        host = _native.host()
        told = (None, True) if of_pass is None else (of_pass.arrival, of_pass.by_task)
        table, scratch = self._memory(batch)
        made = host.Pass(self.steps, session, table, scratch, *told, _native.threads())
        assert made.is_ready
        return made, None if table is None else NormTable(table, self.rows)

    def _memory(self, batch: int) -> tuple[Tensor | None, Tensor | None]:
        """A table, and scratch for launches."""
        if self.dtype is not None:
            return new_numbers(len(self.rows), batch, dtype=self.dtype), None
        if not self.launched.nodes:
            return None, None
        with torch.inference_mode(False):
            return (
                new_table(len(self.rows), batch, self.device),
                torch.empty(self.launched.bytes, dtype=torch.uint8, device=self.device),
            )

    @cached_property
    def all(self) -> bytes:
        """A 1 for each step."""
        return bytes([1]) * len(self.uses)

    def gradients(self, of_pass: Any) -> dict[str, Tensor]:
        """What a pass has made since it was asked last, by parameter."""
        return {self._ordered[row]: grad for row, grad in of_pass.gradients()}

    @cached_property
    def _ordered(self) -> list[str]:
        return list(self.rows)

    def nodes(self, hooked: bytes) -> frozenset[int]:
        """The nodes of the steps that have a 1."""
        if 0 not in hooked:
            return self._all_nodes
        uses = zip(self.uses, hooked, strict=True)
        return frozenset(use.node for use, is_hooked in uses if is_hooked)

    def filled(self, taken: bytes) -> Collection[str]:
        """The parameters whose rows are filled, of the steps that have a 1."""
        key = taken, len(self.launched.nodes)
        if key not in self._filled:
            self._filled.clear()
            there = self.kernels | self.launched.nodes
            self._filled[key] = dict.fromkeys(
                name
                for use, is_taken in zip(self.uses, taken, strict=True)
                if is_taken and use.node in there
                for name in use.parameters
            )
        return self._filled[key]

    def deliveries(
        self, use: Use, node: Node, parameters: Mapping[str, Tensor]
    ) -> Deliveries:
        """The ways back from a use, which is this node, to its parameters."""
        if use.node in self.in_order:
            return [
                (slot.number, path, None) for slot in use.slots for path in slot.paths
            ]
        return deliveries_from(use, node, self.names, parameters)

    @cached_property
    def _all_nodes(self) -> frozenset[int]:
        return frozenset(self.use_at)

    @cached_property
    def _filled(self) -> dict[tuple[bytes, int], Collection[str]]:
        """The answer of `filled` to the last step."""
        return {}


def program_of(
    reading: Reading,
    parameters: Mapping[str, Tensor],
    makes: frozenset[str] = frozenset(),
) -> Program | None:
    """The program of a recipe, made when it is first asked for.

    None without the extension, where rows are routed anew in each step, where regions
    run again, and where compiled ones use the same parameters.

    Args:
        reading: the graph, as it is read.
        parameters: all tracked ones, by name.
        makes: parameters whose gradients the program makes, beside their norms.
    """
    recipe = reading.recipe
    if recipe.routes is not None or recipe.runs_again or not recipe.lasts:
        return None
    if not recipe.plan.uses or not recipe.inside.isdisjoint(recipe.plan.sources):
        return None
    first = reading.tape.nodes[recipe.plan.uses[0].node]._input_metadata[0]
    dtypes = tuple(p.dtype for name, p in parameters.items() if name in makes)
    key = "norms", first.device, first.dtype, makes, dtypes
    if key not in recipe.programs:
        recipe.programs[key] = _make(reading, parameters, makes)
    return recipe.programs[key]


def _make(
    reading: Reading, parameters: Mapping[str, Tensor], makes: frozenset[str]
) -> Program | None:
    host = learned()
    if host is None:
        return None
    recipe, tape = reading.recipe, reading.tape
    reached = recipe.plan.sources
    rows = {name: i for i, name in enumerate(n for n in parameters if n in reached)}
    dtype = _dtype_of(tape, recipe.plan.uses)
    suffix = SUFFIX[torch.float32 if dtype is None else dtype]
    steps = host.Program(suffix, _native.best_isa)
    uses, calls, launched = recipe.plan.uses, {}, Launched()
    makings = [
        Making(
            *(steps, tape, use, recipe.layouts[use.node][0], rows, dtype, calls),
            *(launched, makes, parameters),
        )
        for use in uses
    ]
    observed = [making for making in makings if not making.is_fused]
    halves = tied_halves(makings)
    by_rule = set[int]()
    for making in makings:
        pair = halves.get(making.use.node)
        if pair is not None:
            add_tied(making, pair, [uses.index(half.making.use) for half in pair])
        elif not (add_fused(making) if making.is_fused else add_step(making)):
            making.by_rule()
            by_rule.add(making.use.node)
    kernels = {use.node for use in uses} - by_rule - calls.keys()
    return Program(
        *(steps, uses, rows, dtype if kernels else None, calls, launched),
        tape.nodes[uses[0].node]._input_metadata[0].device,
        {half.making.use.node: half.part for pair in halves.values() for half in pair},
        frozenset(making.use.node for making in observed if making.is_alone),
        *(frozenset(kernels), _names_between(tape, uses)),
    )


def _names_between(tape: Tape, uses: Iterable[Use]) -> dict[int, str]:
    """Names of the nodes between uses and their parameters."""
    slots = [slot for use in uses for slot in use.slots]
    steps = (p.steps or () for slot in slots for p in slot.paths)
    numbers = {slot.child[0] for slot in slots} | {i for s in steps for i, _, _ in s}
    return {i: tape.names[i] for i in numbers}


def _dtype_of(tape: Tape, uses: Iterable[Use]) -> torch.dtype | None:
    """That of most output gradients which kernels read; None where there is none."""
    outputs = [tape.nodes[use.node]._input_metadata[0] for use in uses]
    dtypes = [x.dtype for x in outputs if x.device.type == "cpu" and x.dtype in NATIVE]
    return max(set(dtypes), key=dtypes.count) if dtypes else None
