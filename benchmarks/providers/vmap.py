"""`torch.func.vmap(grad)`, in chunks of samples.

The chunks' gradients are added up, so no other backward pass is needed, and the
statistic is taken chunk by chunk, so that no more than one chunk's gradients exist.
"""

from __future__ import annotations

import torch
from torch.func import functional_call, grad, vmap

from benchmarks.providers.base import Provider, square_sums
from benchmarks.workloads import sample_losses


def _per_sample_gradients(workload):
    def loss(parameters, inputs, target):
        outputs = functional_call(workload.model, parameters, (inputs[None],))
        return sample_losses(outputs, target[None])[0]

    return vmap(grad(loss), in_dims=(None, 0, 0))


def _step(workload, chunk, reduce, finish):
    gradients = _per_sample_gradients(workload)
    parameters = workload.parameters
    detached = {name: p.detach() for name, p in parameters.items()}

    def step():
        workload.model.zero_grad(set_to_none=True)
        parts = []
        for inputs, targets in zip(
            workload.inputs.split(chunk), workload.targets.split(chunk), strict=True
        ):
            grads = gradients(detached, inputs, targets)
            for name, p in parameters.items():
                total = grads[name].sum(dim=0)
                p.grad = total if p.grad is None else p.grad.add_(total)
            parts.append(reduce(grads))
        for p in parameters.values():
            p.grad /= workload.batch_size
        return finish(parts)

    return step


def _norms(workload, chunk):
    def reduce(grads):
        return sum(square_sums(g) for g in grads.values())

    return _step(workload, chunk, reduce, torch.cat)


def _second_moments(workload, chunk):
    def reduce(grads):
        return {name: g.square_().sum(dim=0) for name, g in grads.items()}

    def finish(parts):
        total = parts[0]
        for part in parts[1:]:
            for name, squares in part.items():
                total[name] += squares
        return {name: squares / workload.batch_size for name, squares in total.items()}

    return _step(workload, chunk, reduce, finish)


PROVIDERS = [
    Provider(
        "vmap",
        "vmap(grad), best chunk",
        {"norms": _norms, "second_moments": _second_moments},
        choices={"chunk": (16, 4, 64, 512, 1)},
    )
]
