"""What an audit says of one evaluation: what it draws, changes and computes in."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ._random import drew_elsewhere
from ._rewrites import Rewrites
from ._same import same
from ._trust import Noise
from .audit import CurvatureCheck

if TYPE_CHECKING:
    from ._operator import CurvatureOperator

__all__ = [
    "buffers",
    "drawn",
    "listed",
    "modes",
    "precision",
    "randomness",
    "rewritten",
]

_SHOWN = 6


def drawn(twin: CurvatureOperator) -> list[Any]:
    """The states of the global generators, to be compared."""
    device = twin._layout.device
    states: list[Any] = [torch.get_rng_state().tolist(), random.getstate()]
    numpy = np.random.get_state(legacy=True)  # noqa: NPY002
    states.append([np.asarray(part).tolist() for part in numpy])
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).tolist())
    return states


def randomness(twin: CurvatureOperator, before: list[Any]) -> CurvatureCheck:
    name, looked_at = "random numbers", "the generators before and after an evaluation"
    own = [
        f"layer {name!r} holds its own {held[0]!r}"
        for name, module in twin._model.named_modules()
        if (held := drew_elsewhere(module))
    ]
    if own:
        return CurvatureCheck(
            *(name, looked_at, "; ".join(own[:_SHOWN]), None, None, "note"),
            "Nobody sets it back: see that the product is the same twice.",
        )
    if before == drawn(twin):
        return CurvatureCheck(name, looked_at, "none drawn")
    return CurvatureCheck(
        *(name, looked_at, "some drawn: dropout, noise, samples", None, None, "note"),
        "The operator is that of one fixed draw. model.eval() turns dropout off.",
    )


def buffers(buffers: Sequence[tuple[str, Tensor, Tensor]]) -> CurvatureCheck:
    changed = [name for name, now, then in buffers if not same(now, then)]
    looked_at = f"{len(buffers)} buffers before and after an evaluation"
    if not changed:
        return CurvatureCheck("buffers", looked_at, "none changed")
    return CurvatureCheck(
        *("buffers", looked_at, f"changed: {listed(changed)}", None, None, "note"),
        "They were put back. Where the result of a training-mode layer depends on them "
        "(spectral norm, quantisation), use model.eval().",
    )


def precision(noise: Noise) -> CurvatureCheck:
    narrow = str(noise.dtype).removeprefix("torch.")
    met = (
        f"two evaluations may differ by {noise.repeat:.0e}, <u, A v> and <A u, v> by "
        f"{noise.symmetry:.0e}"
    )
    is_half = torch.finfo(noise.dtype).eps > 1e-4
    return CurvatureCheck(
        *("precision", f"narrowest dtype of the graph: {narrow}", met, None, None),
        "note" if is_half else "ok",
        "Residuals below that are rounding. Leave autocast out of the closure, or "
        "raise the precision of matrix products, to have more."
        if is_half
        else "",
    )


def rewritten(rewrites: Rewrites) -> CurvatureCheck:
    looked_at = "functions whose usual kernel has no right second derivative"
    if not rewrites.met:
        return CurvatureCheck("rewritten", looked_at, "none met")
    calls = [f"{name} ({n} calls)" for name, n in sorted(rewrites.met.items())]
    met = f"computed in another form, to the same values: {listed(calls)}"
    return CurvatureCheck("rewritten", looked_at, met, None, None, "note")


def modes(model: nn.Module) -> list[CurvatureCheck]:
    norms = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ]
    if not norms:
        return []
    return [
        CurvatureCheck(
            *("batch norm", "modes of the layers"),
            f"{len(norms)} in training mode: {listed(norms)}",
            *(None, None, "note"),
            "Each sample's loss depends on those that share its batch. model.eval() "
            "uses the running statistics.",
        )
    ]


def listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {more} more" if more > 0 else shown
