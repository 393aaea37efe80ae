"""dattri-llm: hooks that keep what goes into layers and comes back to them."""

from __future__ import annotations

from torch import nn

from benchmarks.providers.backpack import out_of_place
from benchmarks.providers.base import Provider
from benchmarks.workloads import sample_losses


class _Numbered(nn.Module):
    """A model that is called with its samples' numbers too.

    Without them the library hashes each sample's inputs to tell them apart (SHA-256),
    2 to 3 ms of 24 on W1L.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs, number):
        return self.model(inputs)


def _norms(workload, capture):
    from dattri_llm.gradient import ops
    from dattri_llm.gradient.callbacks import CaptureCallback
    from dattri_llm.gradient.hooks import (
        REGISTER_ALL,
        HookManager,
        HookManagerConfig,
    )

    model = _Numbered(out_of_place(workload.model))
    caught = CaptureCallback()
    manager = HookManager(
        model,
        config=HookManagerConfig(linear_io=REGISTER_ALL, capture_style=capture),
        callbacks=[caught],
        sample_id_key="number",
    )
    numbers = list(range(workload.batch_size))
    scale = workload.batch_size**2  # its gradients are those of loss / batch

    def step():
        workload.model.zero_grad(set_to_none=True)
        with manager.collect():
            outputs = model(workload.inputs, number=numbers)
            sample_losses(outputs, workload.targets).mean().backward()
        record, caught.record = caught.record, None
        if record is None:
            raise RuntimeError("The step ended without a record of its gradients.")
        found = record.gradient
        return scale * sum(
            ops.grad_norm_sq(found.data[name], found.layer_types[name])
            for name in found.layer_names
        )

    return step


PROVIDERS = [
    Provider(
        "dattri-llm",
        "dattri-llm",
        {"norms": _norms},
        module="dattri_llm",
        package="dattri-llm==0.1.0",
        choices={"capture": ("factorized", "auto")},
    )
]
