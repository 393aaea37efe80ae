"""From the sample gradients of whole parameters to the statistics of one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..._dtypes import accumulation_dtype
from ..._flat import dense_values
from ...ops import multi
from ..contributions import Contribution
from .fused import Fusion
from .held import each_square, sum_of_squares
from .norms import Norms, Squares

__all__ = ["Collected", "Collector", "FusedCollector"]


@dataclass
class Collected:
    """What the hooks of one pass gathered, still in units of that pass' gradient."""

    sq_norms: Norms = field(default_factory=Norms)
    second_moments: dict[str, Tensor] = field(default_factory=dict)
    gram: Tensor | None = None
    dots: dict[str, Tensor] = field(default_factory=dict)
    grad_sq_norms: list[Tensor] = field(default_factory=list)  # add up to |grad|^2
    grad_sq_norms_by_parameter: Squares = field(default_factory=Squares)
    grads: dict[str, Tensor] = field(default_factory=dict)


class Collector:
    """Takes each parameter's sample gradients, once they are there.

    Args:
        measure: any of "norms", "second_moments", "gram".
        directions: `{name: {parameter: tensor}}`.
        keep_grads: keep the pass' gradient itself.
        by_parameter: note the squared norm of each parameter's gradient, not their sum
            alone.
    """

    def __init__(
        self,
        measure: frozenset[str],
        directions: Mapping[str, Mapping[str, Tensor]],
        *,
        keep_grads: bool,
        by_parameter: bool = False,
    ) -> None:
        self._measure, self._directions = measure, directions
        self._keep_grads, self._by_parameter = keep_grads, by_parameter
        self.collected = Collected()

    # Parameters whose gradients it makes itself, from their contributions.
    makes: frozenset[str] = frozenset()

    def expect(self, source: Callable[[], Mapping[str, Tensor]]) -> None:
        """Ask a program for the gradients that it makes, when they are needed."""

    def add(self, parameter: str, gradient: Tensor) -> None:
        """Note a gradient that the pass leaves out."""
        raise NotImplementedError

    @property
    def wants_norms_only(self) -> bool:
        """Whether squared norms are all that it takes of the samples."""
        return self._measure <= {"norms"} and not self._directions

    def take(self, parameter: str, whole: Contribution) -> None:
        """The statistics of one parameter."""
        into = self.collected
        if "gram" in self._measure:
            gram = whole.gram()
            into.sq_norms[parameter] = gram.diagonal().clone()
            into.gram = gram if into.gram is None else into.gram + gram
        else:
            into.sq_norms[parameter] = whole.sq_norms()
        if "second_moments" in self._measure:
            into.second_moments[parameter] = whole.second_moment()
        self._add_dots(parameter, whole)

    def make(self, parameter: str, whole: Contribution) -> Tensor:
        """The gradient of one parameter, made with the statistics of its samples."""
        into = self.collected
        found = whole.fused(with_second_moment="second_moments" in self._measure)
        into.sq_norms[parameter] = found.sq_norms
        if found.second_moment is not None:
            into.second_moments[parameter] = found.second_moment
        self._add_dots(parameter, whole)
        return found.total

    def _add_dots(self, parameter: str, whole: Contribution) -> None:
        given = {k: v[parameter] for k, v in self._directions.items() if parameter in v}
        if not given:
            return
        into = self.collected.dots
        found = whole.several_dots(list(given.values()))
        for direction, dots in zip(given, found, strict=True):
            sofar = into.get(direction)
            into[direction] = dots if sofar is None else sofar + dots

    def read_gradients(self, parameters: Mapping[str, Tensor]) -> None:
        """Note the gradients of a pass, all there is in `.grad` now."""
        if not self._keep_grads and self._by_parameter:
            each = each_square(parameters)
            if each is not None:
                self.take_squares(*each)
                return
        elif not self._keep_grads:
            total = sum_of_squares(parameters)
            if total is not None:
                self.collected.grad_sq_norms.append(total)
                return
        grads = {name: p.grad for name, p in parameters.items()}
        self.take_gradients({n: g for n, g in grads.items() if g is not None})

    @property
    def wants_squares_only(self) -> bool:
        """Whether |grad|^2 is all that it takes of each parameter's gradient."""
        return not self._keep_grads

    def take_squares(self, names: Iterable[str], squares: Tensor) -> None:
        """Note squared norms of the gradients of some parameters, `[names]`."""
        if self._by_parameter:
            self.collected.grad_sq_norms_by_parameter.add(names, squares)
        self.collected.grad_sq_norms.append(squares.sum())

    def take_gradients(self, grads: Mapping[str, Tensor]) -> None:
        """Note the gradients of some parameters in this pass."""
        values = []
        for name, grad in grads.items():
            values.append(dense_values(grad))
            if self._keep_grads:
                kept = grad.to_dense() if grad.is_sparse else grad.clone()
                self.collected.grads[name] = kept
        if not values:
            return
        if self._by_parameter:
            squares = multi.each_sq_norm(values)
            self.collected.grad_sq_norms_by_parameter.add(grads, squares)
            total = squares.sum()
        else:
            total = multi.multi_sq_norm(values)
        dtype = accumulation_dtype(values[0].dtype)
        self.collected.grad_sq_norms.append(total.to(dtype))


class FusedCollector(Collector):
    """Makes the gradients that the pass leaves out, together with their statistics."""

    def __init__(
        self,
        measure: frozenset[str],
        directions: Mapping[str, Mapping[str, Tensor]],
        fusion: Fusion,
        *,
        keep_grads: bool,
        by_parameter: bool = False,
    ) -> None:
        super().__init__(
            measure, directions, keep_grads=keep_grads, by_parameter=by_parameter
        )
        self._fusion = fusion
        self.makes = fusion.names

    def expect(self, source: Callable[[], Mapping[str, Tensor]]) -> None:
        """Ask a program for the gradients that it makes, when they are needed."""
        self._fusion.expect(source)

    def add(self, parameter: str, gradient: Tensor) -> None:
        """Note a gradient that the pass leaves out."""
        self._fusion.add(parameter, gradient)

    def take(self, parameter: str, whole: Contribution) -> None:
        """The statistics of one parameter, and its gradient if the pass has none."""
        if parameter not in self.makes:
            super().take(parameter, whole)
            return
        self._fusion.add(parameter, self.make(parameter, whole))
