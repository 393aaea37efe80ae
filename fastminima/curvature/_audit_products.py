"""What an audit says of products: the same twice, symmetric, and derivatives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._differences import Comparison, compared, in_double, of_one_batch
from ._scale import dot, norm
from ._trust import Noise, Suspicion, SymmetryWatch, difference
from .audit import CurvatureCheck

if TYPE_CHECKING:
    from ._operator import CurvatureOperator

__all__ = [
    "asymmetry",
    "look_at_differences",
    "look_at_products",
    "not_finite",
    "not_symmetric",
    "random_columns",
    "repeated",
]

_PAIRS = 3
_SMALL = 0.1  # of a parameter's scale beside the others', where it is zero
_GUILTY = 0.1  # of the squared difference: a parameter that is named
_SHOWN = 80  # letters of an error
_LOSSES = 1e-2  # the share of what products may differ by that losses may
# What a closure, a copy or a batch may raise that knows one dtype alone.
_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError)


def look_at_products(twin: CurvatureOperator, seed: int) -> list[CurvatureCheck]:
    """The loss and a product twice, and symmetry between random vectors."""
    columns = list(random_columns(twin, 2 * _PAIRS, seed))
    noise = twin._checks.noise
    assert noise is not None
    try:
        products = twin._multiply(columns)
        before = twin._checks.finished_pass()
        twin._kept = None
        again = twin._multiply(columns[:1])[0]
        after = twin._checks.finished_pass()
    except ValueError as error:
        return [
            CurvatureCheck(
                *("products", "random vectors", "refused", None, None, "WRONG"),
                str(error),
            )
        ]
    if not all(bool(torch.isfinite(p).all()) for p in products):
        return [not_finite()]
    gap = abs(before[0] - after[0]) / max(abs(before[0]), abs(after[0]), 1e-300)
    looked_at = f"two passes: {before[0]:.7g} and {after[0]:.7g}"
    lines = [repeated("loss twice", looked_at, gap, _LOSSES * noise.repeat)]
    apart = difference(products[0], again)
    allowed = noise.repeat
    if apart > allowed and lines[0].ok and twin._batches.is_single:
        same_graph = difference(again, twin._multiply(columns[:1])[0])
        allowed = max(allowed, 10 * same_graph)  # as large as one graph's own
    lines.append(repeated("product twice", "two recordings", apart, allowed))
    lines.append(_symmetry(twin, columns, products, noise))
    quick = twin._quick()
    if quick is not None:
        apart = difference(products[0], quick._multiply(columns[:1])[0])
        lines.append(_by_tangents(apart, noise.repeat))
    return lines


def not_finite() -> CurvatureCheck:
    """What there is to say of products that are no numbers."""
    return CurvatureCheck(
        *("products", "random vectors", "not finite", None, None, "WRONG"),
        "Check the parameters and the batch. Roots, norms and quotients have no second "
        "derivative at zero: add something small inside.",
    )


def _by_tangents(error: float, allowed: float) -> CurvatureCheck:
    looked_at = "a product by tangents and one by double backward"
    if error <= allowed:
        return CurvatureCheck("tangents", looked_at, "the same", error, allowed)
    met = "not the same: products are made by double backward"
    return CurvatureCheck("tangents", looked_at, met, error, allowed, "note")


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


def _symmetry(
    twin: CurvatureOperator, columns: list[Tensor], products: list[Tensor], noise: Noise
) -> CurvatureCheck:
    suspicion, worst = asymmetry(columns, products, noise)
    name, looked_at = "symmetry", f"<u, A v> and <A u, v>, {_PAIRS} random pairs"
    numbers = worst, noise.symmetry
    if suspicion is None:
        return CurvatureCheck(name, looked_at, "symmetric", *numbers)
    if getattr(twin, "engine", "") == "finite_differences":
        met = "differences of gradients are no symmetric matrix between kinks"
        return CurvatureCheck(name, looked_at, met, *numbers, "untold")
    if not twin._is_confirmed(suspicion):
        met = "another gap next to the point: all there is here is rounding"
        return CurvatureCheck(
            *(name, looked_at, met, *numbers, "untold"), "Use float64 here."
        )
    return not_symmetric(looked_at, *numbers)


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


def look_at_differences(
    twin: CurvatureOperator, seed: int, causes: str
) -> list[CurvatureCheck]:
    """The gradient and products beside central differences, where that is smooth."""
    with twin._context():
        twin._random.restore()
        batch, weight = next(iter(twin._batches))
    one = of_one_batch(twin, batch, weight)
    where = "in float64"
    if twin.dtype != torch.float64:
        try:
            return _differences(in_double(one), seed, where, causes)
        except _ERRORS as error:  # what knows float32 alone is looked at in that
            where = f"in its own dtype (in float64: {_shortened(error)})"
    try:
        return _differences(one, seed, where, causes)
    except ValueError as error:  # at some distance the loss may be no number
        met = f"not to be had next to the point: {_shortened(error)}"
        return [CurvatureCheck("differences", where, met, verdict="untold")]


def _shortened(error: Exception) -> str:
    return str(error).partition("\n")[0][:_SHOWN] or type(error).__name__


def _differences(
    one: CurvatureOperator, seed: int, where: str, causes: str
) -> list[CurvatureCheck]:
    gradient = one._gradient()
    size = norm(torch.cat([p.detach().reshape(-1) for p in one._layout.parameters]))
    directions = {"a random vector": _scaled(one, seed)}
    if norm(gradient) > 0:
        directions = {"the gradient": gradient, **directions}
    lines = []
    for name, direction in directions.items():
        unit = direction * ((size or 1.0) / norm(direction))
        product, slope = compared(one, unit)
        of_slope = f"<g, v> and the loss along {name}, {where}"
        of_product = f"A v and differences along {name}, {where}"
        lines.append(_slope_line(of_slope, slope, causes))
        lines.append(_product_line(one, of_product, product, causes))
    return lines


def _slope_line(looked_at: str, found: Comparison, causes: str) -> CurvatureCheck:
    if not found.is_told or found.ok:
        return _told("gradient", looked_at, found)
    return CurvatureCheck(
        *("gradient", looked_at, "not the derivative of the loss"),
        *(found.error, found.allowed, "WRONG"),
        "Some backward pass is not that of the forward pass, or something that depends "
        f"on the parameters is detached.{causes} If that is meant (a "
        "straight-through estimator, a reversed gradient), products are those of the "
        "Jacobian of this gradient, not second derivatives of the loss.",
    )


def _product_line(
    one: CurvatureOperator, looked_at: str, found: Comparison, causes: str
) -> CurvatureCheck:
    if not found.is_told or found.ok:
        return _told("differences", looked_at, found)
    assert found.apart is not None
    squares = {
        name: float(part.double().square().sum())
        for name, part in one._layout.named(found.apart.to(one.dtype)).items()
    }
    total = sum(squares.values())
    guilty = sorted(squares, key=lambda name: -squares[name])
    named = [n for n in guilty if squares[n] >= _GUILTY * total][:5]
    return CurvatureCheck(
        *("differences", looked_at, f"apart at {', '.join(named)}"),
        *(found.error, found.allowed, "WRONG"),
        "Part of the second derivative is missing: something is detached in a backward "
        "pass or before it (functions in Python, detach(), .data, no_grad(), NumPy, "
        f"hooks), at these parameters or next to them.{causes}",
    )


def _told(name: str, looked_at: str, found: Comparison) -> CurvatureCheck:
    if found.step is None:
        met = "kinks are crossed by every step tried: not smooth here"
        return CurvatureCheck(name, looked_at, met, verdict="untold")
    numbers = (found.error, found.allowed)
    if not found.is_told:
        met = f"a step and its half differ by {found.doubt:.0e}: not smooth here, or "
        met += "no more than rounding"
        return CurvatureCheck(name, looked_at, met, *numbers, "untold")
    met = f"they agree, by a step of {found.step:.0e} of the parameters' length"
    return CurvatureCheck(name, looked_at, met, *numbers)


def random_columns(one: Any, count: int, seed: int) -> Tensor:
    """So many random vectors, one a row."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (count, one.shape[0])
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(one.device, one.dtype)


def _scaled(one: CurvatureOperator, seed: int) -> Tensor:
    """A random direction that moves every parameter by the same share of its size."""
    parameters = one._layout.parameters
    sizes = [
        norm(p.detach().reshape(-1)) / max(p.numel(), 1) ** 0.5 for p in parameters
    ]
    small = _SMALL * max(sizes) or 1.0
    parts = one._layout.split(random_columns(one, 1, seed + 1)[0])
    return one._layout.join(
        [part * (size or small) for part, size in zip(parts, sizes, strict=True)]
    )
