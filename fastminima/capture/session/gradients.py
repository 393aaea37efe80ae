"""The gradients of one pass, read when they are about to be accumulated."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ... import _native
from ...ops._arguments import NATIVE
from ..graph.extension import learned
from ..graph.tape import Tape
from ..graph.undisturbed import undisturbed
from .arrival import PassFilter
from .collector import Collector
from .norms import new_numbers

__all__ = ["Gradients"]


class Gradients:
    """Hooks on the accumulators of parameters, or on the edges that lead to them.

    Args:
        collector: takes what comes.
        parameters: by name.
        split: parameters whose gradient comes in parts, from several graphs.
        of_pass: tells the pass that is observed from others.
    """

    def __init__(
        self,
        collector: Collector,
        parameters: Mapping[str, Tensor],
        split: Container[str],
        of_pass: PassFilter,
    ) -> None:
        self._collector, self._parameters, self._split = collector, parameters, split
        self._filter = of_pass
        self._accumulators: dict[str, Any] = {}
        self._separated: set[str] = set()
        self._taken: set[str] = set()
        self._parts: dict[str, Tensor] = {}
        # Of the extension: hooks, squared norms as they come, and the leaves' names.
        self._leaves: Any = None
        self._squares: Tensor | None = None
        self._names: list[str] = []

    def hook(self, tape: Tape, used: Container[str]) -> list[Any]:
        """Read the gradients of the parameters that are leaves; returns handles."""
        handles = []
        for name, i in tape.leaves.items():
            node = tape.nodes[i]
            # One accumulator serves all graphs alive.
            if name in used and self._accumulators.get(name) is not node:
                self._accumulators[name] = node
                handles.append(node.register_prehook(self._leaf_hook(name)))
        return handles

    def hook_known(self, tape: Tape, used: Container[str]) -> bool:
        """As `hook`, by the extension; False where it cannot read these.

        Their squared norms alone are kept, each in its parameter's dtype.
        """
        host = learned()
        found = {name: i for name, i in tape.leaves.items() if name in used}
        dtypes = {self._parameters[name].dtype for name in found}
        if host is None or not self._collector.wants_squares_only or len(dtypes) != 1:
            return False
        (dtype,) = dtypes
        if dtype not in NATIVE:
            return False
        self._squares = new_numbers(len(found), dtype=dtype)
        self._names = list(found)
        self._leaves = host.Leaves(
            *(self, self._squares, self._filter.arrival, self._filter.by_task),
            *(_native.best_isa, _native.threads()),
        )
        self._leaves.hook(tape.nodes, list(found.values()))
        return True

    def leaf(self, number: int, grads: tuple[Tensor | None, ...]) -> None:
        """Take a gradient that the extension does not read."""
        self._leaf_hook(self._names[number])(grads)

    def separate(self, tape: Tape, names: Iterable[str]) -> list[Any]:
        """Read some parameters' gradients where they leave this graph, from now on.

        Something else in the pass, such as a penalty on weights, has gradients for
        them too. Returns handles.
        """
        handles = []
        for name in names:
            self._separated.add(name)
            if self._leaves is not None and name in self._names:
                self._leaves.leave_out(self._names.index(name))
            shape = self._parameters[name].shape
            for parent, number, _ in tape.parents[tape.leaves[name]]:
                hook = self._edge_hook(name, number, shape)
                handles.append(tape.nodes[parent].register_hook(hook))
        return handles

    def finish(self) -> None:
        """Hand over what came in parts, and what the extension has read."""
        if self._parts:
            with undisturbed():
                self._collector.take_gradients(self._parts)
        read = [] if self._leaves is None else self._leaves.order
        if read:
            assert self._squares is not None
            names = [self._names[number] for number in read]
            self._collector.take_squares(names, self._squares[: len(read)])

    def clear(self) -> None:
        """Let go of the graphs."""
        self._accumulators.clear()
        if self._leaves is not None:
            self._leaves.close()

    def _add(self, name: str, grad: Tensor) -> None:
        sofar = self._parts.get(name)
        self._parts[name] = grad.clone() if sofar is None else sofar + grad

    def _edge_hook(
        self, name: str, number: int, shape: torch.Size
    ) -> Callable[[Any, Any], None]:
        def hook(grad_inputs: tuple[Tensor | None, ...], _: Any) -> None:
            grad = grad_inputs[number]
            if grad is None or self._filter.is_anothers():
                return
            with undisturbed():
                self._add(
                    name, grad if grad.shape == shape else grad.sum_to_size(shape)
                )

        return hook

    def _leaf_hook(self, name: str) -> Callable[[tuple[Tensor | None, ...]], None]:
        def hook(grads: tuple[Tensor | None, ...]) -> None:
            grad = grads[0]
            if grad is None or name in self._separated:
                return
            if self._filter.is_anothers() and not (
                name not in self._taken and self._filter.is_over()
            ):
                return
            self._taken.add(name)
            with undisturbed():
                if name in self._split:
                    self._add(name, grad)
                else:
                    self._collector.take_gradients({name: grad})

        return hook
