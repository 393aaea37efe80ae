"""fastminima."""

from __future__ import annotations

import torch

from benchmarks.providers.base import Provider
from benchmarks.workloads import mean_loss


def _probe(workload, measure, mode="observe"):
    import fastminima as fm

    probe = fm.GradientProbe(workload.model, measure=measure, mode=mode)

    def step():
        workload.model.zero_grad(set_to_none=True)
        stats = probe.backward(workload.losses())
        return stats.sq_norms if measure == "norms" else stats.second_moments

    return step


def _loss(model, batch):
    inputs, targets = batch
    return mean_loss(model(inputs), targets)


def _product(workload, vector):
    import fastminima as fm

    hessian = fm.Hessian(workload.model, _loss, workload.batch)
    return lambda: hessian @ vector


def _lanczos(workload):
    import fastminima as fm

    def solve(seed):
        hessian = fm.Hessian(workload.model, _loss, workload.batch)
        pairs = fm.top_eigenpairs(hessian, rtol=1e-2, seed=seed)
        return pairs.values[0].item(), pairs.products

    return solve


def _power(workload):
    import fastminima as fm

    def solve(seed):
        hessian = fm.Hessian(workload.model, _loss, workload.batch)
        pairs = fm.top_eigenpairs(hessian, method="power", rtol=1e-2, seed=seed)
        return pairs.values[0].item(), pairs.products

    return solve


def _warm(workload):
    """A `SharpnessProbe` called again after one SGD step; only that call is timed."""
    import fastminima as fm

    probe = fm.SharpnessProbe(workload.model, _loss, rtol=1e-2)
    parameters = list(workload.parameters.values())

    def prepare():
        # One step back and one step forth: the probe has seen the point one SGD
        # step away, and the point where it is asked is the one the others see.
        before = [p.detach().clone() for p in parameters]
        grads = torch.autograd.grad(workload.losses().mean(), parameters)
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p += 0.01 * g
        probe(workload.batch)
        with torch.no_grad():
            for p, saved in zip(parameters, before, strict=True):
                p.copy_(saved)

    def solve(seed):
        pairs = probe(workload.batch)
        return pairs.values[0].item(), pairs.products

    solve.prepare = prepare
    return solve


_OURS = {"module": "fastminima", "package": "fastminima"}
_CURVATURE = {
    "product": ("Hessian",),
    "eigenvalue": ("Hessian", "top_eigenpairs", "SharpnessProbe"),
}

PROVIDERS = [
    Provider(
        "fastminima",
        "**fastminima**",
        {
            "norms": lambda workload: _probe(workload, "norms"),
            "second_moments": lambda workload: _probe(workload, "second_moments"),
            "product": _product,
            "eigenvalue": _lanczos,
        },
        **_OURS,
        needs=_CURVATURE
        | {"norms": ("GradientProbe",), "second_moments": ("GradientProbe",)},
    ),
    Provider(
        "fastminima-fused",
        '**fastminima** `mode="fused"`',
        {
            "norms": lambda workload: _probe(workload, "norms", "fused"),
            "second_moments": lambda workload: _probe(
                workload, "second_moments", "fused"
            ),
        },
        **_OURS,
        needs={"norms": ("GradientProbe",), "second_moments": ("GradientProbe",)},
    ),
    Provider(
        "fastminima-warm",
        "**fastminima** SharpnessProbe, after one more SGD step",
        {"eigenvalue": _warm},
        **_OURS,
        needs=_CURVATURE,
    ),
    Provider(
        "fastminima-power",
        "**fastminima** power iteration",
        {"eigenvalue": _power},
        **_OURS,
        needs=_CURVATURE,
        slow_eigenvalue=frozenset({"W3", "W5"}),
    ),
]
