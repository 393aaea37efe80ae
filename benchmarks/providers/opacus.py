"""Opacus: ghost norms, and per-sample gradients, outside its privacy engine."""

from __future__ import annotations

from benchmarks.providers.backpack import out_of_place
from benchmarks.providers.base import Provider, square_sums


def _ghost_norms(workload):
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        out_of_place(workload.model), loss_reduction="mean", use_ghost_clipping=True
    )

    def step():
        workload.model.zero_grad(set_to_none=True)
        workload.losses().mean().backward()
        return wrapped.get_norm_sample().square()

    return step


def _per_sample(workload, measure):
    from opacus.grad_sample import GradSampleModule

    GradSampleModule(out_of_place(workload.model), loss_reduction="mean")
    parameters = workload.parameters

    def step():
        workload.model.zero_grad(set_to_none=True)
        for p in parameters.values():
            p.grad_sample = None
        workload.losses().mean().backward()
        if measure == "norms":
            return sum(square_sums(p.grad_sample) for p in parameters.values())
        return {
            name: p.grad_sample.square_().sum(dim=0) / workload.batch_size
            for name, p in parameters.items()
        }

    return step


_OPACUS = {"module": "opacus", "package": "opacus==1.6.0"}

PROVIDERS = [
    Provider("opacus-ghost", "Opacus ghost", {"norms": _ghost_norms}, **_OPACUS),
    Provider(
        "opacus-per-sample",
        "Opacus per-sample",
        {
            "norms": lambda workload: _per_sample(workload, "norms"),
            "second_moments": lambda workload: _per_sample(workload, "second_moments"),
        },
        **_OPACUS,
    ),
]
