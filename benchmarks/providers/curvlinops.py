"""curvlinops: jvp of the gradient, as a linear operator for SciPy's `eigsh`."""

from __future__ import annotations

import numpy as np
from torch import nn

from benchmarks.providers.base import Provider, math_attention, split
from benchmarks.workloads import mean_loss


class _MeanLoss(nn.Module):
    reduction = "mean"

    def forward(self, outputs, targets):
        return mean_loss(outputs, targets)


def _operator(workload):
    from curvlinops import HessianLinearOperator

    return HessianLinearOperator(
        workload.model,
        _MeanLoss(),
        list(workload.parameters.values()),
        [workload.batch],
        check_deterministic=False,  # its safeguard costs several products
    )


def _product(workload, vector):
    operator = _operator(workload)
    parts = split(vector, workload.parameters.values())

    def step():
        with math_attention():
            return operator @ parts

    return step


def _eigsh(workload):
    from scipy.sparse.linalg import LinearOperator, eigsh

    def solve(seed):
        operator = _operator(workload).to_scipy()
        products = 0

        def product(vector):
            nonlocal products
            products += 1
            return operator @ vector

        counted = LinearOperator(operator.shape, matvec=product, dtype=operator.dtype)
        start = np.random.default_rng(seed).standard_normal(operator.shape[0])
        with math_attention():
            values = eigsh(
                counted,
                k=1,
                which="LA",
                tol=1e-2,
                v0=start.astype(operator.dtype),
                return_eigenvectors=False,
            )
        return float(values[0]), products

    return solve


PROVIDERS = [
    Provider(
        "curvlinops",
        "curvlinops (jvp of gradient; eigsh, tol 1e-2)",
        {"product": _product, "eigenvalue": _eigsh},
        module="curvlinops",
        package="curvlinops-for-pytorch==3.0.1",
    )
]
