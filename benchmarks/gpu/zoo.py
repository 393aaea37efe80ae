"""What is trained on GPUs: networks with a batch, at the size they are trained at.

`full` is that size. `narrow` has as many layers, so narrow and short that only the host
counts: what it needs for a use is told by a step of it. `smoke` runs on a CPU in a
moment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.gpu.networks import Llama, ResNet50, VisionTransformer
from benchmarks.models import GPT2
from benchmarks.workloads import Workload

__all__ = ["RECIPES", "SIZES", "TOLERANCE", "Recipe", "build"]

SIZES = ("full", "narrow", "smoke")
# Of squared norms, against single samples of the same graph: both round, bfloat16 has 8
# bits, and a gradient's rounding adds up over layers.
TOLERANCE = {"float32": 1e-3, "autocast": 3e-2, "bfloat16": 6e-2}


@dataclass(frozen=True)
class Recipe:
    """A network and a batch by size, and the precision that it is trained in."""

    name: str
    precision: str  # float32, autocast or bfloat16
    make: Callable[[str], nn.Module]
    data: Callable[[str], tuple[Tensor, Tensor]]
    channels_last: bool = False


class _Precise(nn.Module):
    """A network in its precision, whose outputs are float32 for the loss."""

    def __init__(self, network: nn.Module, precision: str):
        super().__init__()
        self.network, self.precision = network, precision

    def forward(self, x: Tensor) -> Tensor:
        enabled = self.precision == "autocast"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=enabled):
            return self.network(x).float()


def build(recipe: Recipe, size: str, device: str) -> Workload:
    """The same numbers at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _Precise(recipe.make(size), recipe.precision)
        inputs, targets = recipe.data(size)
    model, inputs, targets = (x.to(device) for x in (model, inputs, targets))
    if recipe.precision == "bfloat16":
        model = model.bfloat16()
        inputs = inputs.bfloat16() if inputs.is_floating_point() else inputs
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
        inputs = inputs.to(memory_format=torch.channels_last)
    return Workload(recipe.name, model, inputs, targets)


def _gpt2(size: str) -> nn.Module:
    if size == "full":
        return GPT2(time=1024, depth=12)
    return GPT2(512, 16, 64, 2, 12 if size == "narrow" else 2)


def _llama(size: str) -> nn.Module:
    if size == "full":
        return Llama()
    return Llama(512, 64, 128, 4, 2, 16 if size == "narrow" else 2)


def _vit(size: str) -> nn.Module:
    if size == "full":
        return VisionTransformer()
    return VisionTransformer(32, 64, 2, 12 if size == "narrow" else 2, 10)


def _resnet(size: str) -> nn.Module:
    return ResNet50((1, 1, 1, 1) if size == "smoke" else (3, 4, 6, 3))


def _tokens(vocabulary: int):
    """Next tokens of random ones: eight rows of 1024."""

    def data(size: str) -> tuple[Tensor, Tensor]:
        high, batch, time = vocabulary, 8, 1024
        if size != "full":
            high, batch, time = 512, 8 if size == "narrow" else 3, 16
        ids = torch.randint(high, (batch, time + 1))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    return data


def _images(batch: int, small_batch: int = 8):
    def data(size: str) -> tuple[Tensor, Tensor]:
        count, side, classes = batch, 224, 1000
        if size != "full":
            count, side, classes = small_batch if size == "narrow" else 3, 32, 10
        return torch.randn(count, 3, side, side), torch.randint(classes, (count,))

    return data


RECIPES = (
    Recipe("GPT-2 124M", "bfloat16", _gpt2, _tokens(50257)),
    Recipe("Llama 0.3B", "bfloat16", _llama, _tokens(32000)),
    Recipe("ViT-B/16", "autocast", _vit, _images(32)),
    Recipe("ResNet-50 GroupNorm", "autocast", _resnet, _images(64), True),
    Recipe("GPT-2 124M", "autocast", _gpt2, _tokens(50257)),
)
