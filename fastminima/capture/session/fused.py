"""Weight gradients by our own kernels: for which uses, and how they reach `.grad`.

In fused mode the backward pass leaves out the products that make these gradients, and
the kernel that computes the statistics of a use makes its gradient from the same tiles.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..graph.passes import is_distributed
from ..reading.reader import Reading
from .fusible import part_of
from .held import may_be_left_out

__all__ = ["Fusion", "FusionPlan", "find_fusion"]


@dataclass(frozen=True)
class FusionPlan:
    """Which gradients passes leave out. It holds names and numbers, and no node.

    Attributes:
        names: parameters whose gradients the session makes, in order.
        uses: the nodes where it sees them.
        others: accumulators of all other gradients.
    """

    names: tuple[str, ...]
    uses: tuple[int, ...]
    others: tuple[int, ...]

    def parameters(self, among: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those whose gradients the session makes, by name."""
        return {name: among[name] for name in self.names}


class Fusion:
    """What a pass leaves out: gradients of parameters, made where the uses are seen.

    Attributes:
        names: parameters whose gradients the session makes.
        inputs: for `backward(inputs=...)`: all other leaves, and the edges into the
            uses, so that the pass visits them. None before `enter`.
    """

    def __init__(self, plan: FusionPlan, parameters: Mapping[str, Tensor]) -> None:
        self.plan, self._parameters = plan, parameters
        self.names = frozenset(parameters)
        self.inputs: list[Any] | None = None
        self._made: dict[str, Tensor] = {}
        self._source: Callable[[], Mapping[str, Tensor]] | None = None
        self._handles: list[Any] = []

    def enter(self, nodes: Sequence[Any], *, is_fresh: bool = False) -> None:
        """Be for the graph of these nodes, whose other leaves may be frozen since.

        `is_fresh`: `.grad` will be that of this pass, and nobody is told when.
        """
        leaves = [nodes[i].variable for i in self.plan.others]
        uses = [nodes[i] for i in self.plan.uses]
        edges = [GradientEdge(node, 0) for node in uses]
        self.inputs = [leaf for leaf in leaves if leaf.requires_grad] + edges
        if is_fresh:
            return
        if is_distributed() or any(map(_has_step, self._parameters.values())):
            # The graph does not keep this alive, nor this the graph.
            deliver = weakref.WeakMethod(self.deliver)
            for node in uses:
                self._handles.append(node.register_hook(_after_use(deliver)))

    def add(self, name: str, grad: Tensor) -> None:
        """Keep a gradient as its parameter is: all of them may wait at once."""
        self._made[name] = grad.to(self._parameters[name])

    def expect(self, source: Callable[[], Mapping[str, Tensor]]) -> None:
        """Ask a program too, for those it has made since it was asked last."""
        self._source = source

    @property
    def made(self) -> dict[str, Tensor]:
        """The gradients, from when their last use is seen until they are delivered."""
        if self._source is not None:
            self._made.update(self._source())
        return self._made

    def deliver(self) -> None:
        """Accumulate the gradients as a backward pass does, with every hook."""
        made = self.made
        if not made:
            return
        parameters = [self._parameters[name] for name in made]
        grads = list(made.values())
        made.clear()
        with torch.inference_mode(False), torch.enable_grad():
            source = _Source.apply(grads, *parameters)
        assert isinstance(source, Tensor)
        source.backward()

    def close(self) -> None:
        """Let go of the graph."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._made.clear()
        self._source = None


class _Source(torch.autograd.Function):
    """Where gradients come from: inside a pass, and held by nobody else.

    So they become `.grad` themselves; those from outside would be copied.
    """

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.grads = grads
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None, *ctx.grads)
        ctx.grads.clear()
        return grads


def _after_use(deliver: weakref.WeakMethod[Callable[[], None]]) -> Callable[..., None]:
    """Deliver inside the pass, where a parameter's last use has run.

    Not before: what is called with the gradient may change the parameter, as an
    optimizer does, and the use reads it.
    """

    def hook(*_: Any) -> None:
        run = deliver()
        if run is not None:
            run()

    return hook


def _has_step(parameter: Tensor) -> bool:
    """Whether something is called as soon as a gradient is there, as by optimizers."""
    return bool(parameter._post_accumulate_grad_hooks)


def find_fusion(
    reading: Reading, parameters: Mapping[str, Tensor], *, with_moments: bool = False
) -> Fusion | None:
    """What a pass over this graph leaves out; None where that is nothing."""
    plan = _plan(reading, parameters, with_moments)
    if plan is None:
        return None
    fusion = Fusion(plan, plan.parameters(parameters))
    fusion.enter(reading.tape.nodes)
    return fusion


def _plan(
    reading: Reading, parameters: Mapping[str, Tensor], with_moments: bool
) -> FusionPlan | None:
    """The parameters of this graph that can be fused; None where there are none.

    Weights of dense layers over several rows a sample and of convolutions, the biases
    beside them, and tables that are such weights too: all of whose uses are known.
    With one row a sample norms have nothing to share, as they are products of row
    norms; second moments share the reading of the rows, where that pays.
    """
    tape, recipe = reading.tape, reading.recipe
    if recipe.runs_again:  # by a backward pass of its own
        return None
    found = {
        use.node: part
        for use in recipe.plan.uses
        if (part := part_of(tape, use, recipe.layouts[use.node])) is not None
    }
    uses = found.values()

    def is_plain(parameter: Tensor) -> bool:
        return parameter.layout == torch.strided and may_be_left_out([parameter])

    def whole(found: Counter[str]) -> set[str]:
        """The parameters of which these are all uses."""
        sources = recipe.plan.sources
        names = (name for name, count in found.items() if count == sources[name])
        return {
            name
            for name in names
            if name not in recipe.inside and is_plain(parameters[name])
        }

    rows = Counter[str]()
    for part in uses:
        rows[part.weight] += part.rows
    shared = (
        part.weight
        for part in uses
        if rows[part.weight] > 1
        or (with_moments and part.shares_rows(parameters[part.weight]))
    )
    names = whole(Counter(shared))
    beside = (part for part in uses if part.weight in names)
    names |= whole(Counter(part.bias for part in beside if part.bias is not None))
    if not names:
        return None
    left_out = {tape.leaves[name] for name in names}
    leaves = (i for i in range(len(tape.nodes)) if tape.is_leaf(i))
    return FusionPlan(
        tuple(sorted(names)),
        tuple(node for node, part in found.items() if part.weight in names),
        tuple(i for i in leaves if i not in left_out),
    )
