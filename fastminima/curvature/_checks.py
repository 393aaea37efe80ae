"""What is looked at, once or now and then, so that an operator is one matrix."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

from .._flat import FlatLayout
from ._graph import Parts
from ._nodes import Survey, foreign_leaves, refuse_nodes, survey
from ._random import drew_elsewhere
from ._ranks import Said
from ._trust import Noise, Suspicion, SymmetryWatch, difference

__all__ = ["Checks"]

_RESCUED = 10  # times what one graph's products differ by, two evaluations may
_LOSS = 1e-2  # the share of what products may differ by that losses may

Pass = tuple[float, int]  # mean loss and number of samples


class Checks:
    """The checks of one operator, and what they have found so far."""

    def __init__(self, operator: str, model: nn.Module) -> None:
        self._operator, self._model = operator, model
        self.noise: Noise | None = None
        self.symmetry = SymmetryWatch()
        self._watches: dict[tuple[int, ...], SymmetryWatch] = {}  # within parameters
        self.products = 0
        self.functions_known, self.weights_known = False, False
        self._survey: Survey | None = None
        self._noted: list[tuple[int, Tensor]] = []
        self._known: tuple[Pass, list[int]] | None = None
        self._joint: Pass | None = None  # of all ranks

    @contextlib.contextmanager
    def within(self, only: tuple[int, ...]) -> Iterator[None]:
        """Products within some parameters, which are compared with each other alone."""
        before = self.symmetry
        self.symmetry = self._watches.setdefault(only, SymmetryWatch())
        try:
            yield
        finally:
            self.symmetry = before

    def start(self) -> None:
        """A solver starts: look at the symmetry of its first products."""
        self.symmetry.reset()
        self._watches.clear()

    def names(self) -> dict[int, str]:
        """The parameters' names by identity."""
        return {id(p): name for name, p in self._model.named_parameters()}

    @property
    def eps(self) -> float:
        """Machine precision of the narrowest dtype met."""
        return torch.finfo(self.noise.dtype if self.noise else torch.float32).eps

    def noise_now(self) -> Noise:
        """What rounding may do where the loss is what the last pass said."""
        noise, (loss, samples) = (
            self.noise or Noise(torch.float32),
            self.finished_pass(),
        )
        return noise.at(loss) if samples else noise

    def forget(self) -> None:
        """Check anew: the operator has become another."""
        self.noise, self._survey, self._known = None, None, None
        self.functions_known, self.weights_known = False, False
        self.symmetry.reset()

    def look_at_graph(self, roots: Sequence[Tensor]) -> None:
        """At first, the nodes of a graph: its precision, and what it cannot have."""
        if self.noise is None:
            refuse_nodes(roots, self.names())
            found = survey(roots)
            self._survey = found if self._survey is None else self._survey | found

    def needs_functions(self) -> bool:
        """Whether there are functions in Python that have not been looked at."""
        has_some = self._survey is not None and bool(self._survey.functions)
        return self.noise is None and has_some and not self.functions_known

    def tolerance_of(self, roots: Sequence[Tensor]) -> float:
        """By which gradients may differ, as far as the nodes of a graph tell."""
        return Noise.of(survey(roots), float(roots[-1].detach().mean())).repeat

    def look_at_reach(
        self, reached: Parts, roots: Sequence[Tensor], layout: FlatLayout, closure: str
    ) -> None:
        """ValueError if a graph was made with the parameters of another model."""
        if all(part is not None for part in reached):
            return
        missing = [
            p.shape
            for p, part in zip(layout.parameters, reached, strict=True)
            if part is None
        ]
        others = foreign_leaves(roots[:1], self.names())
        has_doubles = not Counter(missing) - Counter(leaf.shape for leaf in others)
        is_half = 2 * len(missing) >= len(reached)
        if len(missing) == len(reached) or (is_half and has_doubles):
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in others[:5])
            raise ValueError(
                f"{closure} does not reach {len(missing)} of the {len(reached)} "
                f"trainable parameters of the model given, but {len(others)} other "
                f"trainable tensors, of shapes {shapes or 'none'}. It reads another "
                "model (a global one, a copy, one inside a wrapper): use its first "
                "argument, and pass the model to look at. Parameters that really are "
                "idle can be frozen with requires_grad_(False)."
            )

    def start_pass(self) -> None:
        """A pass over the data begins."""
        self._noted, self._joint = [], None

    def needs_weights(self) -> bool:
        """Whether the first batch has not been asked how it weighs its rows."""
        is_first = self.noise is None and not self._noted
        return is_first and not self.weights_known

    def note(self, samples: int, value: Tensor) -> None:
        """A batch has been recorded."""
        if samples:
            self._noted.append((samples, value))

    def finished_pass(self) -> Pass:
        """Mean loss and number of samples of the pass; (0, 0) if it recorded none."""
        if self._joint is not None:
            return self._joint
        if not self._noted:
            return 0.0, 0
        values = torch.stack([value.double() * w for w, value in self._noted])
        samples = sum(w for w, _ in self._noted)
        return float(values.sum()) / samples, samples

    def surveyed(self) -> tuple[torch.dtype | None, bool]:
        """The narrowest dtype met and whether there are probabilities, if looked at."""
        found = self._survey if self.noise is None else None
        return (None, False) if found is None else (found.dtype, found.saturates)

    def join(self, joint: Said) -> None:
        """The pass was one of all ranks, of which this is known."""
        self._joint = joint.loss, round(joint.weight)
        if self._survey is not None and joint.dtype is not None:
            eps = torch.finfo(joint.dtype).eps
            found = Survey(eps, joint.dtype, joint.saturates, ())
            self._survey = self._survey | found

    def compare(self, first: Tensor, second: Tensor, before: Pass) -> float | None:
        """By how much two evaluations differ, if by more than rounding explains.

        Else what rounding may do is known from here on. `before` is what was noted with
        the first product.
        """
        self.products += 1
        after = self.finished_pass()
        assert self._survey is not None
        noise = Noise.of(self._survey, after[0])
        apart = difference(first, second)
        gap = abs(before[0] - after[0]) / max(abs(before[0]), abs(after[0]), 1e-300)
        is_zero = not bool(first.any() or second.any())
        if apart <= noise.repeat and not (is_zero and gap > noise.repeat):
            self.noise = noise
            return None
        return apart

    def accept(self, apart: float, same_graph: float, before: Pass) -> bool:
        """Whether the graph itself gives products that differ as much.

        Then the backward pass adds in no fixed order, and little is left of its sum; so
        it is if the losses agree.
        """
        after = self.finished_pass()
        assert self._survey is not None
        noise = Noise.of(self._survey, after[0])
        largest = max(abs(before[0]), abs(after[0]))
        is_same = abs(before[0] - after[0]) <= noise.repeat * largest
        if is_same and apart <= _RESCUED * same_graph:
            self.noise = noise
            return True
        return False

    def refuse_difference(
        self, apart: float, before: Pass, is_single: bool
    ) -> NoReturn:
        """ValueError: the matrix is not the same twice."""
        after = self.finished_pass()
        assert self._survey is not None
        noise = Noise.of(self._survey, after[0])
        raise ValueError(
            f"{self._operator} is not the same matrix twice: of its first product, two "
            f"evaluations differ by {apart:.1e} of their size (losses {before[0]:.7g} "
            f"and {after[0]:.7g}); rounding in {noise.dtype} explains "
            f"{noise.repeat:.0e}.{self._hints(before, after, is_single)} Each pass "
            "must see the same batches and random numbers: pass list(loader) in place "
            "of a loader that shuffles or augments; draw noise from the global "
            "generators of torch, Python or NumPy, which are set back for each pass, "
            "or once, outside the closure."
        )

    def _hints(self, before: Pass, after: Pass, is_single: bool) -> str:
        hints = []
        if before[1] != after[1]:
            hints.append(f" One pass had {before[1]} samples, the other {after[1]}.")
        for name, module in self._model.named_modules():
            own = drew_elsewhere(module)
            if own:
                hints.append(f" Layer {name!r} draws from its own {own[0]!r}.")
            is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if is_norm and module.training and not is_single:
                hints.append(
                    f" Layer {name!r} is a batch norm in training mode: its result "
                    "depends on which samples share a batch (model.eval() uses the "
                    "running statistics)."
                )
                break
        return "".join(hints)

    def remember(self, versions: list[int]) -> None:
        """The pass that later ones must repeat, as long as the model is the same."""
        self._known = self.finished_pass(), versions

    def is_other(self, versions: list[int]) -> bool:
        """Whether parameters or buffers have been written since the last pass."""
        return self._known is not None and self._known[1] != versions

    def has_moved(self, versions: list[int], *, is_other: bool) -> bool:
        """Whether the pass that has ended says something else than the one before.

        Not if that was of another model (`is_other`).
        """
        now = self.finished_pass()
        if self._known is None or is_other or not now[1]:
            self._known = now, versions
            return False
        (loss, samples), _ = self._known
        return samples != now[1] or not self.is_same_loss(loss, now[0])

    def is_same_loss(self, first: float, second: float) -> bool:
        """Whether two losses agree to rounding."""
        noise = self.noise or Noise(torch.float32)
        largest = max(abs(first), abs(second))
        return abs(first - second) <= _LOSS * noise.repeat * largest

    def same_after(self, uses: int, old: Tensor, new: Tensor) -> None:
        """ValueError if a kept graph turns out to be out of date."""
        apart = difference(old, new)
        if self.noise is not None and apart > self.noise.repeat:
            raise ValueError(
                f"{self._operator}: what the closure reads has changed, and nothing "
                "showed it: the loss is another than when its graph was recorded, and "
                f"products differ by {apart:.1e} of their size. Some of the last "
                f"{uses} products may be those of before. Pass what changes in the "
                "batch or as an attribute of the model, or make a new operator."
            )

    def look_at_symmetry(
        self, columns: list[Tensor], products: list[Tensor]
    ) -> Suspicion | None:
        """Two vectors between which the matrix seems not to be symmetric, if any."""
        for column, product in zip(columns, products, strict=True):
            suspicion = self.symmetry.look(column, product, self.noise)
            if suspicion is not None:
                return suspicion
        return None

    def refuse(self, suspicion: Suspicion) -> NoReturn:
        """ValueError: the matrix is not symmetric."""
        raise ValueError(
            f"{self._operator} is not symmetric: {suspicion.text}.{self._suspects()}"
        )

    def _suspects(self) -> str:
        functions = self._survey.functions if self._survey else ()
        named = f" here: {', '.join(functions)}" if functions else ""
        return (
            " Some backward pass is not the derivative of its forward pass. Look at "
            f"functions written in Python (torch.autograd.Function{named}) whose "
            "backward detaches, reverses or clips, at hooks on activations, and at "
            "layers with in-place state; torch.autograd.gradgradcheck tests one."
        )
