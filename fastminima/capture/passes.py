"""Extra backward passes over a graph that other probes must not take for training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["belongs_to_another", "run_pass"]

# Engine pass -> whose it is. A pass that is not here is the user's own.
_owners: dict[int, object] = {}


def run_pass(
    output: Tensor,
    leaves: Sequence[Tensor],
    owner: object,
    weights: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of `output` for `leaves`; hooks of sessions other than `owner` rest.

    The graph stays usable and no `.grad` changes.
    """
    top = output.clone()  # its node comes before every hook on the graph
    assert top.grad_fn is not None
    number: list[int] = []

    def mark(grads: tuple[Tensor, ...]) -> None:
        number.append(torch._C._current_graph_task_id())
        _owners[number[0]] = owner

    top.grad_fn.register_prehook(mark)
    try:
        return torch.autograd.grad(
            top,
            leaves,
            grad_outputs=torch.ones_like(top) if weights is None else weights,
            retain_graph=True,
            allow_unused=True,
        )
    finally:
        for i in number:
            _owners.pop(i, None)


def belongs_to_another(session: object) -> bool:
    """Whether the pass that calls this hook is an extra one, not run for `session`."""
    if not _owners:
        return False
    return _owners.get(torch._C._current_graph_task_id(), session) is not session
