"""What an audit says of products: the same twice, symmetric, and derivatives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._audit_lines import (
    asymmetry,
    not_finite,
    not_symmetric,
    random_columns,
    repeated,
)
from ._differences import Comparison, compared, in_double, of_one_batch
from ._scale import norm
from ._trust import Noise, difference
from .audit import CurvatureCheck

if TYPE_CHECKING:
    from ._operator import CurvatureOperator

__all__ = ["look_at_differences", "look_at_products"]

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


def _by_tangents(error: float, allowed: float) -> CurvatureCheck:
    looked_at = "a product by tangents and one by double backward"
    if error <= allowed:
        return CurvatureCheck("tangents", looked_at, "the same", error, allowed)
    met = "not the same: products are made by double backward"
    return CurvatureCheck("tangents", looked_at, met, error, allowed, "note")


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
