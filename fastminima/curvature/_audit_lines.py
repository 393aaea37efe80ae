"""Lines of an audit that are the same for whatever has products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._scale import dot, norm
from ._trust import Noise, Suspicion, SymmetryWatch
from .audit import CurvatureCheck

__all__ = ["asymmetry", "not_finite", "not_symmetric", "random_columns", "repeated"]


def repeated(name: str, looked_at: str, error: float, allowed: float) -> CurvatureCheck:
    """Of something made twice."""
    if error <= allowed:
        return CurvatureCheck(name, looked_at, "the same", error, allowed)
    return CurvatureCheck(
        *(name, looked_at, "not the same", error, allowed, "WRONG"),
        "Each pass must see the same batches and random numbers: pass list(loader) in "
        "place of a loader that shuffles or augments; draw from the global generators, "
        "or once, outside the closure; keep no state in the model between calls.",
    )


def asymmetry(
    columns: list[Tensor], products: list[Tensor], noise: Noise
) -> tuple[Suspicion | None, float]:
    """What is wrong between pairs of vectors, if anything, and the largest gap."""
    pairs = list(zip(columns, products, strict=True))
    scale = max(norm(image) / norm(v) for v, image in pairs)
    watch, worst, suspicion = SymmetryWatch(), 0.0, None
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        (u, image_u), (v, image_v) = first, second
        left, right = float(dot(u, image_v)), float(dot(image_u, v))
        floor = max(abs(left), abs(right), noise.floor * scale * norm(u) * norm(v))
        worst = max(worst, abs(left - right) / (floor or 1.0))
        suspicion = suspicion or watch.between(first, second, noise)
    return suspicion, worst


def not_symmetric(looked_at: str, error: float, allowed: float) -> CurvatureCheck:
    """What there is to say of a matrix that is not."""
    return CurvatureCheck(
        *("symmetry", looked_at, "not symmetric", error, allowed, "WRONG"),
        "Some backward pass is not the derivative of its forward pass: functions in "
        "Python whose backward detaches, reverses or clips, hooks on activations, "
        "layers with in-place state. torch.autograd.gradgradcheck tests one.",
    )


def not_finite() -> CurvatureCheck:
    """What there is to say of products that are no numbers."""
    return CurvatureCheck(
        *("products", "random vectors", "not finite", None, None, "WRONG"),
        "Check the parameters and the batch. Roots, norms and quotients have no second "
        "derivative at zero: add something small inside.",
    )


def random_columns(one: Any, count: int, seed: int) -> Tensor:
    """So many random vectors, one a row."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (count, one.shape[0])
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(one.device, one.dtype)
