"""True Hessian products and eigenvalues, and who agrees with them.

Nothing here uses the package or a peer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Verdict
from benchmarks.providers.base import flat, math_attention, split
from benchmarks.workloads import Workload

__all__ = ["judge_eigenvalue", "judge_product", "product_truth", "top_eigenvalue"]

# Of the whole product, and of each parameter's part of it.
# Kinks: see gradients_oracle.py.
PRODUCT_WORST = 1e-2
PART_WORST = 3e-2
# An answer asked for at 1 % may have used it up.
EIGENVALUE_WORST = 0.03


def cached_product(workload: Workload) -> Callable[[Tensor], Tensor]:
    """Double backward of the mean loss, through one gradient graph."""
    parameters = list(workload.parameters.values())
    with math_attention():
        loss = workload.losses().mean()
        grads = torch.autograd.grad(loss, parameters, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        parts = split(vector, parameters)
        return flat(
            torch.autograd.grad(grads, parameters, parts, retain_graph=True)
        ).detach()

    return product


def product_truth(workload: Workload, vector: Tensor) -> Tensor:
    """The Hessian of the mean loss times a vector, in float64."""
    return cached_product(workload.double())(vector.double())


def judge_product(answer, truth: Tensor, workload: Workload) -> Verdict:
    """Compares a product, flat or in parts, whole and parameter by parameter."""
    got = answer if isinstance(answer, Tensor) else flat(answer)
    error = (got.double() - truth).detach()
    whole = (error.norm() / truth.norm()).item()
    if not whole <= PRODUCT_WORST:
        return Verdict(False, whole, "product")
    parameters = workload.parameters
    floor = 1e-2 * truth.norm()
    worst, name = max(
        ((e.norm() / t.norm().clamp(min=floor)).item(), name)
        for e, t, name in zip(
            split(error, parameters.values()),
            split(truth, parameters.values()),
            parameters,
            strict=True,
        )
    )
    return Verdict(worst <= PART_WORST, worst, f"product's part {name}")


def top_eigenvalue(
    workload: Workload, rtol: float = 1e-3, max_products: int = 150
) -> tuple[float, float]:
    """Largest eigenvalue by Lanczos with full reorthogonalisation in float64.

    Products are in the model's own dtype. Stops when |Hv - value v| <= rtol * value;
    the value's own error is then of second order in that.

    Returns:
        The value and its residual.
    """
    product = cached_product(workload)
    like = flat(workload.parameters.values()).detach()
    generator = torch.Generator().manual_seed(17)
    v = torch.randn(len(like), generator=generator, dtype=torch.float64)
    basis = [v / v.norm()]
    alphas: list[float] = []
    betas: list[float] = []
    value = residual = float("nan")
    for _ in range(max_products):
        w = product(basis[-1].to(like.dtype)).double()
        alphas.append((w @ basis[-1]).item())
        for _ in range(2):
            for u in basis:
                w -= (w @ u) * u
        values, vectors = torch.linalg.eigh(_tridiagonal(alphas, betas))
        betas.append(w.norm().item())
        value = values[-1].item()
        residual = abs(betas[-1] * vectors[-1, -1].item())
        if len(alphas) > 5 and residual <= rtol * abs(value):
            break
        basis.append(w / betas[-1])
    return value, residual


def _tridiagonal(alphas: list[float], betas: list[float]) -> Tensor:
    diagonal = torch.tensor(alphas, dtype=torch.float64).diag()
    if not betas:
        return diagonal
    side = torch.tensor(betas, dtype=torch.float64)
    return diagonal + side.diag(1) + side.diag(-1)


def judge_eigenvalue(values: list[float], truth: float) -> Verdict:
    """Judges several answers by the worst, with its sign."""
    worst = max(((value - truth) / truth for value in values), key=abs)
    ok = abs(worst) <= EIGENVALUE_WORST
    return Verdict(ok, worst, "eigenvalue")
