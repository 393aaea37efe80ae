"""The training step without any measurement: what the others are divided by."""

from __future__ import annotations

import torch

from benchmarks.providers.base import Provider, flat


def _step(workload):
    def step():
        workload.model.zero_grad(set_to_none=True)
        workload.losses().mean().backward()

    return step


def _gradient(workload, vector=None):
    """Forward and backward by `torch.autograd.grad`: the unit of curvature's cost."""
    parameters = list(workload.parameters.values())

    def step():
        return flat(torch.autograd.grad(workload.losses().mean(), parameters))

    return step


PROVIDERS = [
    Provider(
        "plain",
        "plain step",
        {
            "norms": _step,
            "second_moments": _step,
            "product": _gradient,
            "eigenvalue": _gradient,
        },
    )
]
