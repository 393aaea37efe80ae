"""hessian-eigenthings: double backward, recomputed for each product."""

from __future__ import annotations

from benchmarks.providers.base import Provider, math_attention
from benchmarks.workloads import mean_loss


def _operator(workload):
    from hessian_eigenthings import HessianOperator, supervised_loss

    return HessianOperator(workload.model, [workload.batch], supervised_loss(mean_loss))


def _counted(workload):
    """Its operator, and the list in which it leaves a mark for each product."""
    operator = _operator(workload)
    product, marks = operator.matvec, []

    def matvec(vector):
        marks.append(None)
        with math_attention():
            return product(vector)

    operator.matvec = matvec
    return operator, marks


def _product(workload, vector):
    operator, _ = _counted(workload)
    return lambda: operator.matvec(vector)


def _power(workload):
    from hessian_eigenthings import power_iteration_one

    def solve(seed):
        operator, marks = _counted(workload)
        value, *_ = power_iteration_one(operator, tol=1e-2, seed=seed)
        return value, len(marks)

    return solve


def _lanczos(workload, **options):
    from hessian_eigenthings import lanczos

    def solve(seed):
        operator, marks = _counted(workload)
        result = lanczos(operator, k=1, which="LA", seed=seed, **options)
        return result.eigenvalues[0].item(), len(marks)

    return solve


_LIBRARY = {
    "module": "hessian_eigenthings",
    "package": "hessian-eigenthings==1.0.0a5",
}

PROVIDERS = [
    Provider(
        "eigenthings",
        "hessian-eigenthings (recomputed double backward; power iteration, tol 1e-2)",
        {"product": _product, "eigenvalue": _power},
        **_LIBRARY,
        slow_eigenvalue=frozenset({"W3", "W5"}),
    ),
    Provider(
        "eigenthings-lanczos",
        "hessian-eigenthings Lanczos, default steps",
        {"eigenvalue": _lanczos},
        **_LIBRARY,
    ),
    Provider(
        "eigenthings-lanczos-20",
        "hessian-eigenthings Lanczos, 20 steps",
        {"eigenvalue": lambda workload: _lanczos(workload, max_iter=20)},
        **_LIBRARY,
    ),
]
