"""PyHessian: double backward on a cached gradient graph, power iteration."""

from __future__ import annotations

import importlib

import torch

from benchmarks.providers.base import Provider, math_attention, split
from benchmarks.workloads import mean_loss


def _operator(workload):
    from pyhessian import hessian

    with math_attention():
        operator = hessian(workload.model, mean_loss, data=workload.batch, cuda=False)
    # Its set-up leaves gradients that hold their own graph; they are not read again.
    workload.model.zero_grad(set_to_none=True)
    return operator


def _product(workload, vector):
    from pyhessian.utils import hessian_vector_product

    operator = _operator(workload)
    parts = split(vector, operator.params)
    return lambda: hessian_vector_product(operator.gradsH, operator.params, parts)


def _power(workload):
    # The package hides this module behind its class of the same name.
    library = importlib.import_module("pyhessian.hessian")
    product = library.hessian_vector_product

    def solve(seed):
        products = 0

        def counted(*arguments):
            nonlocal products
            products += 1
            return product(*arguments)

        torch.manual_seed(seed)
        library.hessian_vector_product = counted
        try:
            values, _ = _operator(workload).eigenvalues()
        finally:
            library.hessian_vector_product = product
        return values[0], products

    return solve


PROVIDERS = [
    Provider(
        "pyhessian",
        "PyHessian (cached double backward; power iteration)",
        {"product": _product, "eigenvalue": _power},
        module="pyhessian",
        package="PyHessian==0.1",
    )
]
