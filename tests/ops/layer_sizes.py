"""Arguments of every op at the sizes of the benchmark workloads' layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.workloads import WORKLOADS
from fastminima.ops.conv_geometry import ConvGeometry
from tools.kernels.cases import Tensors

__all__ = ["Layer", "arguments", "layers"]


class Layer(NamedTuple):
    """One layer's kind and the shapes of its inputs and outputs."""

    kind: str
    x: tuple[int, ...]
    y: tuple[int, ...]
    options: tuple[Any, ...] = ()


@cache
def layers(workload: str, times: int) -> list[Layer]:
    """The different layers of a workload, with that many times its batch."""
    recipe = WORKLOADS[workload]
    found: dict[Layer, None] = {}
    with torch.device("meta"):
        model, (inputs, _) = recipe.make_model(), recipe.make_data()
        inputs = inputs.new_empty(times * len(inputs), *inputs.shape[1:])
        for module in model.modules():
            if type(module) in _KINDS:
                module.register_forward_hook(_note(found))
        model(inputs)
    return list(found)


def _note(found: dict[Layer, None]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kind, options = _KINDS[type(module)](module)
        found[Layer(kind, tuple(inputs[0].shape), tuple(output.shape), options)] = None

    return hook


def _convolution(module: nn.Module) -> tuple[str, tuple[Any, ...]]:
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    return "conv", (ConvGeometry(*sizes, groups=module.groups),)


_KINDS: dict[type, Callable[[Any], tuple[str, tuple[Any, ...]]]] = {
    nn.Linear: lambda _: ("dense", ()),
    nn.Conv2d: _convolution,
    nn.LayerNorm: lambda _: ("layer_norm", ()),
    nn.GroupNorm: lambda m: ("channel_norm", (m.num_groups,)),
    nn.Embedding: lambda m: ("embedding", (m.num_embeddings,)),
}


def arguments(layer: Layer, new: Tensors) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Names of ops, each with arguments for that layer."""
    return _MAKERS[layer.kind](layer, new)


def _dense(layer: Layer, new: Tensors) -> Iterator[tuple[str, tuple[Any, ...]]]:
    a, g = new.normal(*layer.x), new.normal(*layer.y)
    if a.dim() == 2:
        yield "row_sq_norms", (a, g)
        a, g = a.unsqueeze(1), g.unsqueeze(1)
    d_in, d_out = a.shape[2], g.shape[2]
    yield "sequence_sq_norms", (a, g, True)
    yield "sequence_fused", (a, g, True, True)
    yield "sequence_dots", (a, g, new.normal(d_out, d_in))
    yield "sequence_multi_dots", (a, g, list(new.normal(9, d_out, d_in)))
    yield "sum_over_time", (g,)
    yield "product_over_time", (g, new.normal(*g.shape))
    for name in ("gram_sq_norms", "direct_sq_norms", "sequence_second_moment"):
        yield name, (a, g)
    for name in ("sequence_gram", "sequence_gradients"):
        yield name, (a, g)


def _conv(layer: Layer, new: Tensors) -> Iterator[tuple[str, tuple[Any, ...]]]:
    (geometry,) = layer.options
    x, g = new.normal(*layer.x), new.normal(*layer.y)
    weight = geometry.weight_shape(x, g)
    yield "conv_sq_norms", (x, g, geometry, True)
    yield "conv_fused", (x, g, geometry, True, True)
    yield "conv_dots", (x, g, geometry, new.normal(*weight))
    yield "sum_over_space", (g.flatten(2),)
    for name in ("conv_gradients", "conv_second_moment", "conv_gram"):
        yield name, (x, g, geometry)


def _layer_norm(layer: Layer, new: Tensors) -> Iterator[tuple[str, tuple[Any, ...]]]:
    g, x, rows = new.normal(*layer.y), new.normal(*layer.x), layer.x[:-1]
    for mean in (new.wide(*rows), None):
        yield "layer_norm_gradients", (g, x, mean, new.wide(*rows))


def _channel_norm(layer: Layer, new: Tensors) -> Iterator[tuple[str, tuple[Any, ...]]]:
    g, x = (new.normal(*shape).flatten(2) for shape in (layer.y, layer.x))
    for shared, groups in ((1, x.shape[1]), (len(x), *layer.options)):
        statistics = new.wide(shared, groups), new.wide(shared, groups)
        yield "channel_norm_gradients", (g, x, *statistics)


def _embedding(layer: Layer, new: Tensors) -> Iterator[tuple[str, tuple[Any, ...]]]:
    (rows,), width = layer.options, layer.y[-1]
    ids, g = new.integers(rows, *layer.x), new.normal(*layer.y)
    yield "embedding_sq_norms", (ids, g, -1)
    yield "embedding_gram", (ids, g, -1)
    yield "embedding_second_moment", (ids, g, -1, rows)
    yield "embedding_gradients", (ids, g, -1, rows)
    yield "embedding_dots", (ids, g, -1, new.normal(rows, width))
    head = new.normal(*g.shape), new.normal(*ids.shape, rows)
    yield "tied_cross", (ids, g, -1, *head)


_MAKERS = {
    "dense": _dense,
    "conv": _conv,
    "layer_norm": _layer_norm,
    "channel_norm": _channel_norm,
    "embedding": _embedding,
}
