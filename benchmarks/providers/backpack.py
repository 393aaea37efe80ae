"""BackPACK: module hooks that add an attribute to each parameter."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from benchmarks.providers.base import Provider


def _extended(workload):
    from backpack import extend

    return replace(workload, model=extend(out_of_place(workload.model)))


def out_of_place(model):
    """Full backward hooks do not go with in-place ReLUs: turns those off."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


def _norms(workload):
    from backpack import backpack
    from backpack.extensions import BatchL2Grad

    workload = _extended(workload)
    parameters = list(workload.parameters.values())
    scale = workload.batch_size**2  # its gradients are those of loss / batch

    def step():
        workload.model.zero_grad(set_to_none=True)
        with backpack(BatchL2Grad()):
            workload.losses().mean().backward()
        return scale * sum(p.batch_l2 for p in parameters)

    return step


def _second_moments(workload):
    from backpack import backpack
    from backpack.extensions import SumGradSquared

    workload = _extended(workload)
    parameters = workload.parameters
    scale = workload.batch_size

    def step():
        workload.model.zero_grad(set_to_none=True)
        with backpack(SumGradSquared()):
            workload.losses().mean().backward()
        return {name: scale * p.sum_grad_squared for name, p in parameters.items()}

    return step


PROVIDERS = [
    Provider(
        "backpack",
        "BackPACK",
        {"norms": _norms, "second_moments": _second_moments},
        module="backpack",
        package="backpack-for-pytorch==1.7.1",
        without_norms=frozenset({"W4", "W5", "W6"}),
    )
]
