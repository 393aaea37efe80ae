"""What the curvature operators share: data, vectors, the recorded graph."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._flat import FlatLayout
from ._checks import Checks
from ._data import Batches
from ._guard import differentiable, moved, parameters_kept, unchanged
from ._nodes import explained
from ._random import RandomState
from ._rewrites import Rewrites
from ._state import Snapshot
from ._tape import Tape
from ._trust import Noise, Suspicion, difference
from ._weights import check_weights

__all__ = ["CurvatureOperator", "MeanOperator"]

_MOVES = 4  # of the parameters, before an operator is said not to be symmetric
_MANY = 8  # columns, beside which products with two more cost little
_LOOK_EVERY = 32  # products of a kept graph between looks at the loss


@dataclass
class _Kept:
    """The graph of a single batch, and what it was recorded from."""

    tape: Any
    weight: int
    snapshot: Snapshot
    uses: int = 0


class CurvatureOperator(abc.ABC):
    """A symmetric matrix [P, P] over the flat parameters, known by its products.

    The graph of a single batch is recorded once and kept until the operator goes or
    anything changes that it was recorded from: the model, the batch, what the closures
    read. Several batches are recorded again for each pass, one at a time.

    Random numbers that the closure draws (dropout) are those that would have been drawn
    when the operator was made, in every pass: the operator is one fixed matrix. That it
    is one is looked at: the first product is made twice, and the first pairs of
    products must be those of a symmetric matrix.
    """

    def __init__(
        self,
        model: nn.Module,
        closures: Sequence[Callable[..., Any]],
        data: Any,
        count: Callable[[Any], int] | None,
    ) -> None:
        self._model = model
        self._closures = tuple(closures)
        self._layout = FlatLayout(model)
        self._batches = Batches(data, count)
        self._random = self._generators()
        self._checks = Checks(type(self).__name__, model)
        self._kept: _Kept | None = None
        self._fresh: tuple[Tape, int] | None = None
        self._rewrites = Rewrites()

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P), P the number of trainable scalars."""
        return (self._layout.size, self._layout.size)

    @property
    def dtype(self) -> torch.dtype:
        """What vectors must have; float32 for half-precision models."""
        return self._layout.dtype

    @property
    def device(self) -> torch.device:
        """Where vectors must be."""
        return self._layout.device

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in the order of the flat vector."""
        return self._layout.names

    @property
    def extra_products(self) -> int:
        """Products made so far to compare evaluations, beside those asked for."""
        return self._checks.products

    def named(self, vector: Float[Tensor, " params"]) -> dict[str, Tensor]:
        """A flat vector as tensors shaped like the parameters, by name."""
        self._check(vector)
        return self._layout.named(vector)

    def __matmul__(
        self, other: Float[Tensor, " params"] | Float[Tensor, "params probes"]
    ) -> Float[Tensor, " params"] | Float[Tensor, "params probes"]:
        """The product with a vector [P], or with each column of a matrix [P, k]."""
        self._check(other)
        columns = [other] if other.dim() == 1 else [c.contiguous() for c in other.T]
        if not columns:
            return torch.zeros_like(other)
        products = self._products([c.detach() for c in columns])
        return products[0] if other.dim() == 1 else torch.stack(products, dim=1)

    @property
    def gradient(self) -> Float[Tensor, " params"]:
        """The mean gradient over the data: where `top_eigenpairs` starts from."""
        return self._gradient()

    def begin(self) -> None:
        """A solver starts: a kept graph must be of today, by what the loss says.

        That finds what no comparison can, such as a file that the closure reads.
        """
        self._checks.symmetry.reset()
        if self._is_kept() and self._kept is not None and not self._says_the_same():
            self._kept = None
            self._checks.forget()

    def look_at_mixtures(self) -> None:
        """ValueError unless products with two random vectors show symmetry.

        What is met instead may hardly be coupled: columns of the identity.
        """
        generator = torch.Generator("cpu").manual_seed(1)
        drawn = torch.randn(
            *(2, self.shape[0]), generator=generator, dtype=torch.float64, device="cpu"
        )
        columns = list(drawn.to(self.device, self.dtype))
        self._checks.products += 2
        products = self._multiplied(columns)
        watch = self._checks.symmetry
        pairs = zip(columns, products, strict=True)
        self._judge(watch.between(*pairs, self._checks.noise))

    def trust(self, noise: Noise | None) -> None:
        """Take as checked what has been checked with another operator."""
        self._checks.noise = noise

    @property
    def noise(self) -> Noise | None:
        """What rounding may do to products; None before the first."""
        return self._checks.noise

    @abc.abstractmethod
    def _evaluate(self, batch: Any) -> tuple[Tensor, ...]:
        """What the closures return: the first by the model, the last the loss."""

    @abc.abstractmethod
    def _make(self, roots: tuple[Tensor, ...]) -> Tape:
        """The graph of what `_evaluate` returned, ready for products."""

    @abc.abstractmethod
    def _multiply(self, columns: list[Tensor]) -> list[Tensor]:
        """The product with each of several flat vectors."""

    @abc.abstractmethod
    def _gradient(self) -> Tensor:
        """The flat mean gradient."""

    def _products(self, columns: list[Tensor]) -> list[Tensor]:
        self._look_at_loss(columns[0])
        products = self._multiplied(columns)
        if not self._batches.is_single and self._checks.has_moved(self._versions()):
            self._checks.forget()
        if self._checks.noise is None:
            self._make_twice(columns, products)
        is_first = self._checks.symmetry.is_fresh
        self._judge(self._checks.look_at_symmetry(columns, products))
        if is_first and len(columns) >= _MANY:
            self.look_at_mixtures()
        return products

    def _judge(self, suspicion: Suspicion | None) -> None:
        if suspicion is not None and self._is_confirmed(suspicion):
            self._checks.refuse(suspicion)

    def _multiplied(self, columns: list[Tensor]) -> list[Tensor]:
        try:
            return self._multiply(columns)
        except RuntimeError as error:
            # Something that the snapshot does not know was overwritten in place.
            if self._kept is None or "inplace operation" not in str(error):
                raise
            self._kept = None
            return self._multiply(columns)

    def _make_twice(self, columns: list[Tensor], products: list[Tensor]) -> None:
        """Evaluate and multiply once more; ValueError unless it is the same product."""
        at = next((i for i, p in enumerate(products) if bool(p.any())), 0)
        if not bool(torch.isfinite(products[at]).all()):
            return
        before = self._checks.finished_pass()
        self._kept = None
        again = self._multiply([columns[at]])[0]
        is_single = self._batches.is_single
        apart = self._checks.compare(products[at], again, before)
        if apart is not None and not (
            is_single and self._is_noise(apart, columns[at], again, before)
        ):
            self._kept = None
            self._checks.refuse_difference(apart, before, is_single)
        self._checks.remember(self._versions())

    def _is_noise(
        self, apart: float, column: Tensor, product: Tensor, before: tuple[float, int]
    ) -> bool:
        """Whether the kept graph by itself makes such differences."""
        self._checks.products += 1
        same_graph = difference(product, self._multiply([column])[0])
        return self._checks.accept(apart, same_graph, before)

    def _is_confirmed(self, suspicion: Suspicion) -> bool:
        """Whether a matrix is as little symmetric with parameters moved by rounding."""
        for seed in range(_MOVES):
            self._kept = None
            self._checks.products += 2
            with moved(self._layout.parameters, self._checks.eps, seed):
                images = self._multiply([suspicion.u, suspicion.v])
            self._kept = None
            if not suspicion.is_confirmed_by(*images):
                return False
        return True

    def _look_at_loss(self, column: Tensor) -> None:
        """Now and then, whether the loss still is what the kept graph says."""
        kept = self._kept
        if kept is None:
            return
        kept.uses += 1
        if kept.uses % _LOOK_EVERY or not self._is_kept() or self._says_the_same():
            return
        old = self._multiply([column])[0]
        self._kept = None
        new = self._multiply([column])[0]
        self._checks.products += 2
        self._checks.same_after(kept.uses, old, new)

    def _says_the_same(self) -> bool:
        """Whether the loss of the single batch is what it was when recorded."""
        assert self._kept is not None
        with self._context():
            self._random.restore()
            batch, _ = next(iter(self._batches))
            loss = self._evaluate(batch)[-1].detach().mean()
        return self._checks.is_same_loss(float(loss), float(self._kept.tape.value))

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[Iterator[tuple[Any, int]]]:
        """Within, each batch's recorded graph with its number of samples."""
        self._follow_parameters()
        self._is_kept()
        with self._context():
            try:
                yield self._recordings()
                fresh = self._fresh
            finally:
                self._fresh = None
        if fresh is not None:
            batch, _ = next(iter(self._batches))
            snapshot = Snapshot(self._model, batch, self._closures)
            self._kept = _Kept(*fresh, snapshot)

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        """Where closures run: nothing remains changed, everything is recorded."""
        named = list(self._model.named_parameters())
        with contextlib.ExitStack() as stack:
            stack.enter_context(unchanged(self._model, self._generators()))
            if self._checks.noise is None:
                stack.enter_context(parameters_kept(named, self._closure))
            self._rewrites = stack.enter_context(differentiable(self.device))
            yield

    def _recordings(self) -> Iterator[tuple[Any, int]]:
        self._checks.start_pass()
        if self._kept is not None:
            self._checks.note(self._kept.weight, self._kept.tape.value)
            yield self._kept.tape, self._kept.weight
            return
        self._random.restore()
        for batch, weight in self._batches:
            if self._batches.is_single:
                self._fresh = self._record(batch, weight), weight
                yield self._fresh
            else:
                self._weigh(batch, weight)
                yield self._record(batch, weight), weight

    def _record(self, batch: Any, weight: int) -> Tape:
        roots = self._evaluate(batch)
        self._checks.look_at_graph(roots)
        with self._explained(roots):
            tape = self._make(roots)
        self._checks.look_at_reach(tape.reached, roots, self._layout, self._closure)
        # A vector of losses says itself how many samples it has.
        self._checks.note(weight * roots[-1].numel(), tape.value)
        return tape

    def _weigh(self, batch: Any, weight: int) -> None:
        """The first of several batches: does the loss weigh its rows equally?"""

    def _explained(self, roots: Sequence[Tensor]):
        return explained(roots, self._checks.names(), self._closure)

    def _is_kept(self) -> bool:
        """Whether there is a kept graph, of what is there now."""
        if self._kept is None:
            return False
        if self._kept.snapshot.is_current():
            return True
        if not self._kept.snapshot.is_same_kind:
            self._checks.forget()
        self._kept = None
        return False

    def _follow_parameters(self) -> None:
        """Take in parameters put in the place of others; ValueError where none fits."""
        if not self._layout.is_of(self._model):
            self._layout = self._layout.following(self._model)
            self._kept = None

    def _generators(self) -> RandomState:
        return RandomState(self._layout.device, self._batches.generators)

    def _versions(self) -> list[int]:
        tensors = [*self._model.parameters(), *self._model.buffers()]
        return [0 if t.is_inference() else t._version for t in tensors]

    def _ask(self, closure: Callable[..., Any], *arguments: Any) -> Any:
        """What a closure returns; ValueError if it makes gradients by itself."""
        with self._rewrites.remembering():
            value = closure(*arguments)
        if any(p.grad is not None for p in self._model.parameters()):
            raise ValueError(
                f"{self._closure} calls backward itself: gradients of the parameters "
                "appeared (they were removed again). Return the loss, and leave its "
                "derivatives to the operator."
            )
        return value

    @property
    def _closure(self) -> str:
        return "loss(model, batch)"

    def _check(self, other: Tensor) -> None:
        size, name = self.shape[0], type(self).__name__
        if not isinstance(other, Tensor):
            raise ValueError(
                f"{name} multiplies tensors, got {type(other).__name__}. Pass "
                "torch.as_tensor(v)."
            )
        if other.dim() not in (1, 2) or other.shape[0] != size:
            raise ValueError(
                f"{name} of shape {self.shape} cannot multiply a tensor of shape "
                f"{tuple(other.shape)}. Pass a vector [{size}] or a matrix [{size}, k]."
            )
        if other.dtype != self.dtype or other.device != self.device:
            raise ValueError(
                f"{name} multiplies {self.dtype} on {self.device}, got {other.dtype} "
                f"on {other.device}. Pass v.to({str(self.device)!r}, {self.dtype})."
            )


class MeanOperator(CurvatureOperator):
    """An operator over the data that is the mean of its samples' operators."""

    def _multiply(self, columns: list[Tensor]) -> list[Tensor]:
        split = [self._layout.split(column) for column in columns]
        return self._mean(lambda tape: [tape.product(parts) for parts in split])

    def _gradient(self) -> Tensor:
        return self._mean(lambda tape: [tape.gradient()])[0]

    def _weigh(self, batch: Any, weight: int) -> None:
        if self._batches.is_counted or weight < 2 or not self._checks.is_first():
            return
        state = self._generators()
        roots = self._evaluate(batch)
        tolerance = self._checks.tolerance_of(roots)
        whole = self._slope(roots)
        del roots
        state.restore()
        check_weights(
            lambda part: self._slope(self._evaluate(part)),
            *(batch, whole, weight, tolerance),
        )
        state.restore()

    def _slope(self, roots: tuple[Tensor, ...]) -> Tensor:
        """The flat gradient of a batch, out of the count."""
        with self._explained(roots):
            return self._layout.join(self._make(roots).gradient())

    def _mean(self, visit: Callable[[Any], list[Any]]) -> list[Tensor]:
        with self._recorded() as recordings:
            tape, total = next(recordings)
            sums = [self._layout.join(parts) for parts in self._visited(visit, tape)]
            if self._batches.is_single:
                return sums
            for s in sums:
                s.mul_(total)
            del tape
            for tape, weight in recordings:
                found = self._visited(visit, tape)
                for s, parts in zip(sums, found, strict=True):
                    s.add_(self._layout.join(parts), alpha=weight)
                total += weight
                del tape, found
            return [s.div_(total) for s in sums]

    def _visited(self, visit: Callable[[Any], list[Any]], tape: Any) -> list[Any]:
        with self._explained(tape.roots):
            return visit(tape)
