"""The whole gradients of a few samples, one backward pass each."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import SupportsIndex

import torch
from torch import Tensor, nn

from .._parameters import tracked_parameters
from .errors import explaining
from .graph.passes import run_pass
from .graph.saved import frames_of
from .graph.sharding import is_sharded
from .graph.tape import Tape

__all__ = ["sample_gradients"]


def sample_gradients(
    model: nn.Module | Mapping[str, nn.Parameter],
    losses: Tensor,
    samples: Iterable[SupportsIndex],
) -> dict[str, Tensor]:
    """The gradients of some samples' own losses, whole: `{name: [samples, *shape]}`.

    PyTorch differentiates `losses[n]` once for each sample, so it is exact for any
    network and takes a backward pass a sample; norms of all samples are what
    `GradientProbe` is for. Call it before the step's own backward pass: the graph stays
    usable, no `.grad` changes, and probes that are attached see nothing of it. With
    BatchNorm in training mode a sample's loss depends on the whole batch, and so does
    its gradient.

    Args:
        model: whose parameters; or a dict name -> parameter for some of them.
        losses: the vector `[batch]` of per-sample losses.
        samples: indices into it.

    Returns:
        Gradients of the parameters that `losses` reach, in the order of
        `named_parameters()`; zeros where a sample does not reach one.

    Raises:
        ValueError: for losses that are not a vector with a graph, an index outside
            of it, no index at all, or sharded parameters.
        CaptureError: the graph has been freed by a backward pass.

    Example:
        >>> import torch, fastminima as fm
        >>> model = torch.nn.Linear(3, 1)
        >>> x = torch.randn(8, 3)
        >>> losses = model(x).squeeze(1)
        >>> largest = x.norm(dim=1).topk(2).indices
        >>> gradients = fm.sample_gradients(model, losses, largest)
        >>> torch.equal(gradients["weight"].squeeze(1), x[largest])
        True
        >>> fm.GradientProbe(model).backward(losses).count  # the step goes on
        8
    """
    chosen = _checked(losses, samples)
    parameters = tracked_parameters(model)
    for name, parameter in parameters.items():
        if is_sharded(parameter):
            raise ValueError(
                f"{name!r} is sharded, and no process has a sample's whole gradient of "
                "it. Use data parallelism, or a copy of the model on one device."
            )
    assert losses.grad_fn is not None
    tape = Tape([losses.grad_fn], {id(p): name for name, p in parameters.items()})
    reached = {name: p for name, p in parameters.items() if name in tape.leaves}
    tensors, frames = list(reached.values()), frames_of(tape.nodes)
    if not reached:
        return {}
    with explaining():
        singles = [run_pass(losses[n], tensors, None, frames=frames) for n in chosen]
    return {
        name: torch.stack([_dense(grad, p) for grad in grads])
        for (name, p), grads in zip(
            reached.items(), zip(*singles, strict=True), strict=True
        )
    }


def _checked(losses: Tensor, samples: Iterable[SupportsIndex]) -> list[int]:
    if losses.dim() != 1 or losses.grad_fn is None:
        raise ValueError(
            "Gradients of samples need the vector of per-sample losses with its graph, "
            f"got shape {tuple(losses.shape)} and grad_fn {losses.grad_fn}. Use "
            "reduction='none' in the loss, and gradients enabled."
        )
    chosen = [operator.index(n) for n in samples]
    count = len(losses)
    for n in chosen:
        if not -count <= n < count:
            raise ValueError(f"There is no sample {n} among {count} losses.")
    if not chosen:
        raise ValueError("No sample was chosen. Give at least one index.")
    return chosen


def _dense(grad: Tensor | None, parameter: Tensor) -> Tensor:
    if grad is None:
        return torch.zeros_like(parameter)
    return grad.to_dense() if grad.is_sparse else grad
