"""The gradients of one pass, read when they are about to be accumulated."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..graph.passes import owner_of_pass
from ..graph.tape import Tape
from ..graph.undisturbed import undisturbed
from .arrival import Arrival
from .collector import Collector

__all__ = ["Gradients"]


class Gradients:
    """Hooks on the accumulators of parameters, or on the edges that lead to them.

    Args:
        collector: takes what comes.
        parameters: by name.
        split: parameters whose gradient comes in parts, from several graphs.
        is_anothers: whether the pass that runs is not the one that is observed.
        arrival: of the loss, where the pass is not run by the probe itself.
    """

    def __init__(
        self,
        collector: Collector,
        parameters: Mapping[str, Tensor],
        split: Container[str],
        is_anothers: Callable[[], bool],
        arrival: Arrival | None,
    ) -> None:
        self._collector, self._parameters, self._split = collector, parameters, split
        self._is_anothers, self._arrival = is_anothers, arrival
        self._accumulators: dict[str, Any] = {}
        self._separated: set[str] = set()
        self._taken: set[str] = set()
        self._parts: dict[str, Tensor] = {}

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

    def separate(self, tape: Tape, names: Iterable[str]) -> list[Any]:
        """Read some parameters' gradients where they leave this graph, from now on.

        Something else in the pass, such as a penalty on weights, has gradients for
        them too. Returns handles.
        """
        handles = []
        for name in names:
            self._separated.add(name)
            shape = self._parameters[name].shape
            for parent, number, _ in tape.parents[tape.leaves[name]]:
                hook = self._edge_hook(name, number, shape)
                handles.append(tape.nodes[parent].register_hook(hook))
        return handles

    def finish(self) -> None:
        """Hand over what came in parts."""
        self._collector.take_gradients(self._parts)

    def clear(self) -> None:
        """Let go of the graphs."""
        self._accumulators.clear()

    def _add(self, name: str, grad: Tensor) -> None:
        sofar = self._parts.get(name)
        self._parts[name] = grad.clone() if sofar is None else sofar + grad

    def _edge_hook(
        self, name: str, number: int, shape: torch.Size
    ) -> Callable[[Any, Any], None]:
        def hook(grad_inputs: tuple[Tensor | None, ...], _: Any) -> None:
            grad = grad_inputs[number]
            if grad is None or self._is_anothers():
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
            if self._is_anothers() and not self._is_late(name):
                return
            self._taken.add(name)
            with undisturbed():
                if name in self._split:
                    self._add(name, grad)
                else:
                    self._collector.take_gradients({name: grad})

        return hook

    def _is_late(self, name: str) -> bool:
        """Whether a gradient comes after the pass, which left it out.

        As of a probe in fused mode that runs the pass.
        """
        is_over = self._arrival is not None and self._arrival.is_on(by_task=False)
        return is_over and owner_of_pass() is None and name not in self._taken
