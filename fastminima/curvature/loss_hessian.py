"""The Hessian of a loss whose graph is there already: that of a training step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._flat import FlatLayout
from ._audit_loss import look_at_loss
from ._explained import explained
from ._functions import look_at_given_functions
from ._graph import GradientGraph, Parts, accumulate, check_mean
from ._guard import buffers_kept, gradient_hooks_off
from ._matrix import FlatMatrix
from ._nodes import foreign_leaves, nodes_of, place_of, refuse_nodes, survey
from ._ranks import Said, ranks_of
from ._recorded_hooks import RecordedHooks
from ._same import fingerprint
from ._shards import is_sharded
from ._trust import Noise
from .audit import CurvatureAudit, refuse_ranks
from .recording import twice_differentiable

__all__ = ["LossHessian"]

# Nodes of a forward pass that was recorded for one derivative only, and what they are.
_ONCE = {
    "ScaledDotProduct": "fused attention",
    "CudnnRnn": "a recurrent layer of cuDNN",
    "MiopenRnn": "a recurrent layer of MIOpen",
    "WeightNormInterface": "fused weight norm, whose second derivative is wrong",
    "CompiledFunction": "a compiled region",
}


class LossHessian(FlatMatrix):
    """The Hessian of a loss at the graph that a training step has recorded.

    Nothing is evaluated: the gradient that the step needs anyway is made in a form that
    can be differentiated again, and a product is one backward pass through it. Random
    numbers, batch statistics and autocast are those of the step. It lives as long as
    the parameters stay as they are; let go of it before the optimizer's step.

    What compares evaluations in `Hessian` has only one here: products are looked at for
    symmetry alone.

    Args:
        model: The model; its parameters that require grad are the variables.
        losses: The losses of samples, of which the mean counts, or that mean itself,
            with its graph.
        scale: What they have been multiplied by: a GradScaler's factor, or one over the
            steps of accumulation. Products and gradient are divided by it.
        functions_known: Whether functions in Python have been looked at in another
            graph of the same loss; else those are refused of which one graph cannot
            tell whether their backward can be differentiated.
        process_group: The ranks whose mean loss is meant, as for `Hessian`; each counts
            alike.

    Raises:
        ValueError: No trainable parameter; a loss that is not finite, or without a
            graph, or that reaches none of the parameters; nodes without a second
            derivative, such as fused attention (`fm.twice_differentiable()` around the
            forward pass records another form). At a product: parameters that have
            changed; a vector of another shape, dtype or device.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> H = LossHessian(model, model(x).square())
        >>> H @ torch.tensor([1.0, 1.0])
        tensor([1., 9.])
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Tensor,
        *,
        scale: float = 1.0,
        functions_known: bool = False,
        process_group: Any = None,
    ) -> None:
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale must be positive and finite, got {scale}.")
        if any(map(is_sharded, model.parameters())):
            raise ValueError(
                "The model's parameters are sharded (fully_shard): a step's graph does "
                "not hold them. Pass the batch in place of the loss."
            )
        self._model, self._scale = model, scale
        self._layout = FlatLayout(model)
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._ranks = ranks_of(model, process_group, None)
        with self._together(), torch.enable_grad():
            self._record(losses, functions_known)

    def _record(self, losses: Tensor, functions_known: bool) -> None:
        self._roots = (check_mean(_checked(losses).mean(), "loss"),)
        self._noise = self._looked_at(functions_known)
        others = foreign_leaves(self._roots, self._names)
        self._others = [leaf for leaf in others if leaf.requires_grad]
        self._hooks = RecordedHooks(self._model, self._roots)
        with self._bare(), buffers_kept(self._model) as self._moved:
            self._graph = GradientGraph(
                self._roots, self._layout.parameters, self._others
            )
        if all(part is None for part in self._graph.reached):
            raise ValueError(
                f"The loss reaches none of the {len(self._layout.names)} trainable "
                "parameters of the model given. Pass the model that it was computed "
                "with."
            )
        self._versions = [p._version for p in self._layout.parameters]

    _only: tuple[int, ...] | None = None  # parameters within which products are made

    def __matmul__(
        self, other: Float[Tensor, " params"] | Float[Tensor, "params probes"]
    ) -> Float[Tensor, " params"] | Float[Tensor, "params probes"]:
        """The product with a vector [P], or with each column of a matrix [P, k]."""
        with self._together():
            self._check(other)
        if other.dim() == 1:
            return self._product(other.detach())
        columns = [column.contiguous() for column in other.detach().T]
        if not columns:
            return torch.zeros_like(other)
        return torch.stack([self._product(column) for column in columns], dim=1)

    def audit(self, *, seed: int = 0) -> CurvatureAudit:
        """Look at what one graph tells of its products; prints as a table.

        Its precision, nodes without a second derivative, what it reaches, a product
        twice, and symmetry between random vectors. What takes another evaluation is
        untold: the gradient, and products beside central differences.

        Args:
            seed: Of the random vectors.

        Raises:
            ValueError: Where several ranks have the data between them.
        """
        refuse_ranks(self._ranks)
        self._check(torch.zeros(self.shape[0], dtype=self.dtype, device=self.device))
        with self._bare():
            lines = look_at_loss(
                *(self, self._model, self._graph, self._layout, self._names),
                *(self._noise, seed),
            )
        return CurvatureAudit(
            f"LossHessian {self.shape[0]} x {self.shape[1]}", tuple(lines)
        )

    def _within(self, other: Tensor, only: tuple[int, ...]) -> Tensor:
        self._only = only
        try:
            return self @ other
        finally:
            self._only = None

    @property
    def gradient(self) -> Float[Tensor, " params"]:
        """The gradient of the mean loss."""
        return self._joined(self._graph.gradient, ())

    @property
    def noise(self) -> Noise | None:
        """What rounding may do to products."""
        return self._noise

    def deliver(self) -> None:
        """Add to `.grad` what `loss.backward()` adds, with the hooks of parameters.

        The gradients of all leaves that the loss reaches, the model's or not, of the
        loss as it was given, not divided by `scale`. Where there are hooks in its
        graph, it is one more backward pass, in which they run.
        """
        if self._hooks.are_there:
            with twice_differentiable():
                accumulate(self._roots)
            return
        with torch.no_grad():
            for buffer, moved in self._moved:
                buffer.copy_(moved)
        leaves = [*self._layout.parameters, *self._others]
        found = [
            (leaf, grad.detach())
            for leaf, grad in zip(leaves, self._graph.all_gradients, strict=True)
            if grad is not None
        ]
        torch.autograd.backward(
            [leaf for leaf, _ in found], [grad for _, grad in found]
        )

    def _check(self, other: Tensor) -> None:
        super()._check(other)
        if self._versions != [p._version for p in self._layout.parameters]:
            raise ValueError(
                "The parameters have changed since the loss was computed: its graph is "
                "that of before. Make products before the optimizer's step."
            )

    def _product(self, column: Tensor) -> Tensor:
        self._products_made += 1
        parts = self._layout.split(column)
        # Copies are for checkpoints that move buffers; the first pass has told.
        kept = buffers_kept(self._model) if self._moved else contextlib.nullcontext()
        with kept:
            return self._joined(
                lambda: self._graph.product(parts, self._only), (column,)
            )

    def _joined(self, make: Callable[[], Parts], columns: Sequence[Tensor]) -> Tensor:
        """The flat vector of what is made, of all ranks where there are several.

        Each counts alike, as DistributedDataParallel has it.
        """
        with self._together(), self._bare():
            vector = self._layout.join(make()).div_(self._scale)
        if self._ranks is None:
            return vector
        loss = float(self._roots[0].detach())
        said = Said(weight=1, loss=loss, columns=fingerprint(columns))
        return self._ranks.mean([vector], said)[0][0]

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Around this rank's part of a vector: what it raises all ranks raise."""
        if self._ranks is None:
            yield
            return
        layout = self._layout
        like = torch.zeros((), dtype=layout.dtype, device=layout.device)
        with self._ranks.together(like, layout.size):
            yield

    @contextlib.contextmanager
    def _bare(self) -> Iterator[None]:
        """Where derivatives are made: without hooks, each error explained.

        What is checkpointed is computed again as it was.
        """
        with (
            gradient_hooks_off(self._model, self._others),
            self._hooks.off(),
            twice_differentiable(),
            torch.autocast(self._layout.device.type, enabled=False),
            explained(self._roots, self._names, "the loss"),
        ):
            yield

    def _looked_at(self, functions_known: bool) -> Noise:
        _refuse_single(self._roots, self._names)
        refuse_nodes(self._roots, self._names)
        found = survey(self._roots)
        if found.functions and not functions_known:
            look_at_given_functions(self._roots, self._names)
        return Noise.of(found, float(self._roots[0].detach()))


def _checked(losses: Any) -> Tensor:
    """The losses; ValueError unless they are numbers with a graph."""
    is_tensor = isinstance(losses, Tensor)
    if not is_tensor or not losses.is_floating_point() or not losses.numel():
        met = f"{losses.dtype} of shape {tuple(losses.shape)}" if is_tensor else losses
        raise ValueError(
            "Losses must be a tensor of real numbers, at least one, with its graph; "
            f"got {met}. Pass the losses of samples, or their mean."
        )
    if not losses.requires_grad:
        raise ValueError(
            "The losses are a tensor without a graph: they depend on no trainable "
            "parameter, or a backward pass has been run for them already. Compute them "
            "anew from the model's own parameters, without detach() or no_grad()."
        )
    return losses


def _refuse_single(roots: Sequence[Tensor], names: dict[int, str]) -> None:
    """ValueError for what was recorded in a form with one derivative only."""
    for node in nodes_of(roots):
        what = next((text for part, text in _ONCE.items() if part in node.name()), None)
        if what is not None:
            raise ValueError(
                f"The loss was recorded with {what}: {node.name()} "
                f"({place_of(node, names)}). Compute it within "
                "fm.twice_differentiable(), which records a form with two derivatives, "
                "or pass the batch in place of the loss."
            )
