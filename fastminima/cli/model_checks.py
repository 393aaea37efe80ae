"""What a model and the machine tell of a run, before anything is evaluated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from .. import _native
from ..capture.options import BatchNorm
from .findings import Finding, some

__all__ = ["of_machine", "of_modules", "of_parameters"]

_HALF = (torch.float16, torch.bfloat16)
_SCALED = (
    " Gradients: multiply the loss, as a GradScaler does, and pass scale=; those that "
    "round to zero are not read."
)


def of_machine(model: nn.Module) -> Iterator[Finding]:
    """Devices, and kernels that are not there."""
    devices = {parameter.device.type for parameter in model.parameters()}
    if len(devices) > 1:
        yield Finding(
            "note", "devices", f"parameters lie on {', '.join(sorted(devices))}"
        )
    if "cpu" in devices and torch.cuda.is_available():
        yield Finding(
            "slow",
            "device",
            "the model is on the CPU, and there is a GPU",
            remedy="model.cuda() before the probe is made.",
        )
    if devices == {"cpu"} and _native.missing_reason is not None:
        yield Finding(
            "slow",
            "native kernels",
            "not there",
            f"{_native.missing_reason}; PyTorch's own operations serve.",
            "Install where there is a C++ compiler.",
        )
    if "cuda" in devices and (reason := _native.cuda_missing_reason()) is not None:
        yield Finding(
            "slow",
            "CUDA kernels",
            "not there",
            f"{reason}; Triton's and PyTorch's ways serve.",
            "Install with nvcc on PATH, or CUDA_HOME set.",
        )


def of_parameters(model: nn.Module) -> Iterator[Finding]:
    """Frozen and shared ones, and their dtypes."""
    tracked = {n: p for n, p in model.named_parameters() if p.requires_grad}
    frozen = sum(not p.requires_grad for p in model.parameters())
    if not tracked:
        yield Finding(
            "refused",
            "parameters",
            "none of them requires a gradient",
            remedy="Unfreeze.",
        )
    if frozen:
        plural = "parameter is" if frozen == 1 else "parameters are"
        yield Finding("note", "frozen", f"{frozen} {plural} not tracked")
    kinds = Counter(str(p.dtype).removeprefix("torch.") for p in tracked.values())
    dtypes = {p.dtype for p in tracked.values()}
    if any(dtype.is_complex for dtype in dtypes):
        yield Finding(
            "refused",
            "dtype",
            "complex parameters",
            remedy="Write that part with real numbers.",
        )
    elif not dtypes.isdisjoint(_HALF):
        yield Finding(
            "note",
            "dtype",
            ", ".join(f"{count} {name}" for name, count in kinds.items()),
            "Statistics are summed in float32. Curvature in half precision is rough: "
            "differences of rounded gradients.",
            "Curvature: a copy of the model in float32."
            + (_SCALED if torch.float16 in dtypes else ""),
        )
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    shared = [name for name, p in tracked.items() if names[id(p)] > 1]
    if shared:
        yield Finding(
            "note",
            "shared parameters",
            some(shared),
            "Exact: what their uses have in common is added, for one more product.",
        )


def of_modules(model: nn.Module, batchnorm: BatchNorm) -> Iterator[Finding]:
    """What mixes samples, or is one rank of several."""
    mixing = [
        name or "the model"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and (module.training or module.running_mean is None)
    ]
    if mixing:
        chosen = {
            "error": ("refused", "the loss defines no gradient of one sample"),
            "rows": ("note", "read as each sample's rows of the ordinary pass"),
            "frozen": ("slow", "statistics as constants, by a second backward pass"),
        }
        verdict, what = chosen[batchnorm]
        yield Finding(
            verdict,
            "batch normalisation",
            f"in training mode: {some(mixing)}",
            f"It mixes the samples of a batch: {what}.",
            'batchnorm="rows" or "frozen", model.eval(), or fm.MinibatchVariance.'
            if verdict == "refused"
            else "",
        )
    wrapped = [n for n in ("DistributedDataParallel", "FSDPModule") if _is(model, n)]
    if wrapped:
        yield Finding(
            "note",
            "ranks",
            wrapped[0],
            "Without a process group, statistics are of this rank's samples.",
            'process_group="world".',
        )


def _is(model: nn.Module, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(model).__mro__)
