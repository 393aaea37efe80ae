"""Hooks that a recorded graph runs, which products must not run again."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as modules_of_torch

from ._nodes import nodes_of

__all__ = ["RecordedHooks", "registered", "retained"]

_OF_MODULES = "BackwardHookFunction"  # nodes that full backward hooks of modules are on


_MARK = "fastminima_has_hooks"  # in the metadata of nodes of activations


class _RecordedHook:
    """A hook on an activation, called unless hooks of recorded graphs are off."""

    def __init__(self, hook: Callable[[Tensor], Any]) -> None:
        self._hook = hook
        _recorded.add(self)

    def __call__(self, grad: Tensor) -> Any:
        """What the hook makes of a gradient; None, which leaves it as it is, if off."""
        return None if _silent else self._hook(grad)


_recorded: weakref.WeakSet[_RecordedHook] = weakref.WeakSet()  # as long as graphs are
_retained: list[weakref.ref[Tensor]] = []  # activations with `retain_grad`
_silent: list[RecordedHooks] = []  # those that are off, in whatever thread hooks run


def registered(tensor: Tensor, hook: Callable[[Tensor], Any]) -> Any:
    """`tensor.register_hook(hook)`, of which the graph knows if it is an activation."""
    if tensor.grad_fn is None:
        return tensor.register_hook(hook)
    _mark(tensor.grad_fn)
    return tensor.register_hook(_RecordedHook(hook))


def retained(tensor: Tensor) -> None:
    """`tensor.retain_grad()`, of which the graph knows if it is an activation."""
    tensor.retain_grad()
    if tensor.grad_fn is not None:
        _mark(tensor.grad_fn)
        _retained[:] = [known for known in _retained if known() is not None]
        _retained.append(weakref.ref(tensor))


def _mark(node: Any) -> None:
    node.metadata[_MARK] = True


class RecordedHooks:
    """The hooks of a recorded graph: of modules, of activations, and on nodes beside.

    Those on activations are known that were put there within `twice_differentiable`.

    Attributes:
        are_there: Whether there may be some. Hooks on nodes alone are not looked for:
            to be asked, each node would have to be given one.
    """

    def __init__(self, model: nn.Module, roots: Sequence[Tensor]) -> None:
        is_marked = bool(_recorded) or any(known() is not None for known in _retained)
        self.are_there = _has_old_hooks(model) or any(
            _OF_MODULES in node.name() or (is_marked and _MARK in node.metadata)
            for node in nodes_of(roots)
        )
        self._live = list(_hooks_of_nodes(roots)) if self.are_there else []

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Within, backward passes run none of them, and retain no gradients."""
        kept = [(live, dict(live)) for live in self._live]
        held = [x for known in _retained if (x := known()) is not None]
        gradients = [(activation, activation.grad) for activation in held]
        _silent.append(self)
        try:
            for live, _ in kept:
                live.clear()
            yield
        finally:
            _silent.remove(self)
            for live, before in kept:
                live.update(before)
            for activation, gradient in gradients:
                activation.grad = gradient


def _has_old_hooks(model: nn.Module) -> bool:
    """Whether there are hooks of `register_backward_hook`, which may be on any node."""
    of_all = modules_of_torch._global_backward_hooks
    if of_all and modules_of_torch._global_is_full_backward_hook is False:
        return True
    return any(
        bool(module._backward_hooks) and module._is_full_backward_hook is False
        for module in model.modules()
    )


def _hooks_of_nodes(roots: Sequence[Tensor]) -> Iterator[dict]:
    """The dictionaries in which nodes have their hooks, where there are some.

    A hook that is registered goes into the dictionary of the others.
    """
    for node in nodes_of(roots):
        if hasattr(node, "variable"):
            continue  # of a leaf: run where gradients are accumulated, and only there
        for register in (node.register_hook, node.register_prehook):
            handle = register(_nothing)
            live = handle.hooks_dict_ref()
            handle.remove()
            if live:
                yield live


def _nothing(*_: Any) -> None:
    return None
