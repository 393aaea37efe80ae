"""Statistics by layer: parameters grouped by where they are in the model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .smoothing import SmoothedNoiseScale

__all__ = ["By", "Grouping", "LayerNumbers", "layer_of", "without_wrappers"]

By = Literal["layer", "block", "parameter"] | int | None
OWN = "(own)"  # parameters that the model itself holds
_WORDS = ("layer", "block", "parameter")
# Modules that torch.compile, checkpointing and the first FSDP put around others.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def layer_of(parameter: str, by: By = "layer") -> str:
    """The group that a parameter belongs to.

    Args:
        parameter: its name, as of `model.named_parameters()`.
        by: "layer", the module that holds it; "block", the path up to the first number
            in it (a repeated block), or the layer where there is none; a number, so
            many steps of the path; "parameter", itself.

    Example:
        >>> from fastminima.monitor.layers import layer_of
        >>> name = "transformer.h.3.mlp.c_fc.weight"
        >>> [layer_of(name, by) for by in ("layer", "block", 1)]
        ['transformer.h.3.mlp.c_fc', 'transformer.h.3', 'transformer']
        >>> layer_of("bias")
        '(own)'
    """
    if by == "parameter":
        return parameter
    path = parameter.split(".")[:-1]
    if by == "block":
        number = next((i for i, part in enumerate(path) if part.isdigit()), len(path))
        path = path[: number + 1]
    elif by != "layer":
        path = path[:by]
    return ".".join(path) or OWN


def without_wrappers(parameters: Sequence[str]) -> list[str]:
    """Names of a model's parameters as they are without what wraps it.

    A run has the same layers under `torch.compile` and DistributedDataParallel, whose
    only part is "module".

    Example:
        >>> from fastminima.monitor.layers import without_wrappers
        >>> without_wrappers(["module._orig_mod.0.weight", "module._orig_mod.0.bias"])
        ['0.weight', '0.bias']
    """
    paths = [
        [part for part in name.split(".") if part not in _WRAPPERS]
        for name in parameters
    ]
    while paths and all(len(path) > 1 and path[0] == "module" for path in paths):
        paths = [path[1:] for path in paths]
    return [".".join(path) for path in paths]


class Grouping:
    """Which layers rows have.

    Args:
        by: as for `layer_of`; None for no layers at all.
        pattern: a regular expression; layers in whose name it is not found are left
            out.

    Raises:
        ValueError: for another word, a depth below one, a pattern that is none.
    """

    def __init__(self, by: By = "layer", pattern: str | None = None) -> None:
        self.by: By = by
        is_depth = isinstance(by, int) and not isinstance(by, bool) and by >= 1
        if not (by is None or by in _WORDS or is_depth):
            raise ValueError(
                f"by must be one of {_WORDS}, a depth of at least 1, or None, got "
                f"{by!r}."
            )
        try:
            self._pattern = None if pattern is None else re.compile(pattern)
        except re.error as error:
            raise ValueError(f"layers={pattern!r} is no pattern: {error}.") from None
        self._known: tuple[tuple[str, ...], Groups] | None = None

    def groups(self, parameters: Iterable[str]) -> Groups | None:
        """The layers of some parameters, in their order; None where none is asked."""
        if self.by is None:
            return None
        names = tuple(parameters)
        if self._known is None or self._known[0] != names:
            self._known = names, self._found(names)
        return self._known[1]

    def _found(self, names: Sequence[str]) -> Groups:
        assert self.by is not None
        places: dict[str, int] = {}
        layers = [layer_of(name, self.by) for name in without_wrappers(names)]
        of = [places.setdefault(layer, len(places)) for layer in layers]
        shown = [
            place
            for layer, place in places.items()
            if self._pattern is None or self._pattern.search(layer)
        ]
        if self._pattern is not None and not shown:
            first = ", ".join(repr(layer) for layer in list(places)[:4])
            warnings.warn(
                f"layers={self._pattern.pattern!r} is found in no layer's name, so "
                f"rows have none. There are {first}"
                f"{', ...' if len(places) > 4 else ''}.",
                stacklevel=2,
            )
        return Groups(tuple(places), np.array(of, dtype=np.intp), tuple(shown))


@dataclass(frozen=True)
class Groups:
    """Layers of a list of parameters.

    Attributes:
        layers: names.
        of: the layer of each parameter.
        shown: the layers that rows have.
    """

    layers: tuple[str, ...]
    of: np.ndarray
    shown: tuple[int, ...]

    def total(self, numbers: Sequence[float]) -> np.ndarray:
        """Sums over the parameters of each layer."""
        return np.bincount(self.of, numbers, minlength=len(self.layers))


class LayerNumbers:
    """What rows say of each layer, and the running averages behind it.

    Args:
        smoothing: weight of the past in the running averages.
        is_written: whether rows have the smoothed noise scale and its interval.
    """

    def __init__(self, smoothing: float, *, is_written: bool) -> None:
        self._decay, self._is_written = smoothing, is_written
        self._smoothed: dict[tuple[str, ...], SmoothedNoiseScale] = {}

    def row(
        self,
        groups: Groups,
        sq_norms: Sequence[float],
        mean_sq_norms: Sequence[float],
        count: int,
    ) -> dict[str, float]:
        """The "layers/" group of a row.

        Args:
            groups: the layers.
            sq_norms: of each parameter, the mean of |g_n|^2 over the samples.
            mean_sq_norms: of each parameter, |mean of g_n|^2.
            count: number of samples behind the mean.
        """
        columns = {
            "sq_norm": groups.total(sq_norms),
            "mean_grad_sq_norm": groups.total(mean_sq_norms),
        }
        if count > 1:
            norms, means = columns.values()
            columns |= self._derived(groups, norms, means, count)
        values = {name: column.tolist() for name, column in columns.items()}
        return {
            f"layers/{groups.layers[i]}/{name}": column[i]
            for i in groups.shown
            for name, column in values.items()
        }

    def _derived(
        self, groups: Groups, norms: np.ndarray, means: np.ndarray, count: int
    ) -> dict[str, np.ndarray]:
        with np.errstate(all="ignore"):
            trace = (norms - means) * (count / (count - 1))
            signal = means - trace / count
            found = {
                "covariance_trace": trace,
                "signal": signal,
                "noise_scale": trace / signal,
                "share": trace / trace.sum(),
            }
        smoothed = self._smoothed.get(groups.layers)
        if smoothed is None:
            smoothed = SmoothedNoiseScale(self._decay)
            self._smoothed = {groups.layers: smoothed}
        ratio = smoothed.update(trace, signal)
        if self._is_written:
            low, high = smoothed.interval()
            found |= {
                "noise_scale_smoothed": np.asarray(ratio),
                "noise_scale_low": np.asarray(low),
                "noise_scale_high": np.asarray(high),
            }
        return found

    def state_dict(self) -> dict[str, object]:
        """The running averages, as plain numbers and lists."""
        return {
            "layers": [list(names) for names in self._smoothed],
            "smoothed": [one.state_dict() for one in self._smoothed.values()],
        }

    def load_state_dict(self, state: dict[str, list]) -> None:
        """Go on from running averages."""
        self._smoothed = {}
        for names, one in zip(state["layers"], state["smoothed"], strict=True):
            smoothed = self._smoothed[tuple(names)] = SmoothedNoiseScale(self._decay)
            smoothed.load_state_dict(one)
