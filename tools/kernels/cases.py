"""Arguments of every op at sizes that occur in training, on any device.

On `meta` tensors they are free: kernels are compiled, and costs counted, for the sizes
that a GPU would see.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastminima import ops
from fastminima.ops.attention import Scores
from fastminima.ops.conv_geometry import ConvGeometry
from fastminima.ops.random import Noise
from fastminima.ops.table import REGISTRY, Op

__all__ = ["ARGUMENTS", "Case", "Tensors", "all_ops", "cases", "launched", "launchers"]


@dataclass(frozen=True)
class Tensors:
    """Makes tensors on one device; those with a value come from torch's generator."""

    device: str
    dtype: torch.dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_()

    def wide(self, *shape: int) -> Tensor:
        """In the accumulation dtype, positive: statistics that a layer has saved."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.rand(shape, dtype=dtype, device=self.device) + 0.5

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, device=self.device)


_DIRECTION = ("direction",)  # stands for a tensor shaped like the weight
Make = Callable[[Tensors], tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """One op with arguments of one size and dtype."""

    op: Op
    size: str
    dtype: torch.dtype
    make: Make
    backend: str = "triton"

    @property
    def label(self) -> str:
        way = " by torch" if self.backend == "torch" else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op.name} {self.size}{way} {dtype}"

    @property
    def key(self) -> torch.dtype:
        """The dtype that the table of the op looks at: that of the first argument."""
        first = self.make(Tensors("meta", self.dtype))[0]
        return (first if isinstance(first, Tensor) else first[0]).dtype

    def has(self, backend: str, device: str = "cuda") -> bool:
        return backend in self.op.backends(device, self.key)

    def launch(self, tensors: Tensors) -> Any:
        """Run its implementation for CUDA on arguments that may be anywhere."""
        return self.op.on(self.backend, "cuda", self.key)(*self.make(tensors))


def _rows(new: Tensors, batch: int, d_in: int, d_out: int) -> tuple[Tensor, ...]:
    return new.normal(batch, d_in), new.normal(batch, d_out)


# batch, time, width in and out
_SEQUENCES = {
    "16x512x768->3072": (16, 512, 768, 3072),
    "64x32x768->768": (64, 32, 768, 768),
    "16x100x257->129": (16, 100, 257, 129),
}


def _dense(
    new: Tensors, *, size: tuple[int, ...], then: tuple[Any, ...]
) -> tuple[Any, ...]:
    batch, time, d_in, d_out = size
    pair = new.normal(batch, time, d_in), new.normal(batch, time, d_out)
    return *pair, *((new.normal(d_out, d_in),) if then == _DIRECTION else then)


def _sequences(*then: Any) -> dict[str, Make]:
    """With more arguments behind the two tensors."""
    return {
        name: partial(_dense, size=size, then=then) for name, size in _SEQUENCES.items()
    }


def _first(sizes: dict[str, Make]) -> dict[str, Make]:
    """For ops that share their kernels with an op that has all sizes."""
    return dict(list(sizes.items())[:1])


# batch, channels in and out, positions, kernel, stride, groups
_CONVOLUTIONS = {
    "64x256@8->512 k3": (64, 256, 512, 8, 3, 1, 1),
    "64x3@32->64 k3": (64, 3, 64, 32, 3, 1, 1),
    "64x96@14->96 k7 depthwise": (64, 96, 96, 14, 7, 1, 96),
}


def _conv(
    new: Tensors, *, size: tuple[int, ...], then: tuple[Any, ...]
) -> tuple[Any, ...]:
    batch, c_in, c_out, side, kernel, stride, groups = size
    geometry = ConvGeometry(
        (kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2, (1, 1), groups
    )
    out = (side - 1) // stride + 1
    pair = new.normal(batch, c_in, side, side), new.normal(batch, c_out, out, out)
    if then == _DIRECTION:
        then = (new.normal(c_out, c_in // groups, kernel, kernel),)
    return *pair, geometry, *then


def _convolutions(*then: Any) -> dict[str, Make]:
    return {
        name: partial(_conv, size=size, then=then)
        for name, size in _CONVOLUTIONS.items()
    }


def _tokens(new: Tensors, *extra: Any) -> tuple[Any, ...]:
    return new.integers(50257, 16, 512), new.normal(16, 512, 768), -1, *extra


def _basis(new: Tensors, count: int) -> list[Tensor]:
    return [new.normal(10_000_000) for _ in range(count)]


def _list(new: Tensors) -> list[Tensor]:
    """The parameters of twelve transformer blocks of width 768."""
    sizes = [(2304, 768), (768, 768), (3072, 768), (768, 3072), *[(768,)] * 6]
    return [new.normal(*size) for size in sizes for _ in range(12)]


def _langevin(new: Tensors, *, has_velocities: bool) -> tuple[Any, ...]:
    params, velocities = _list(new), _list(new) if has_velocities else None
    noise = Noise(1, 0, range(len(params)), 0.01)
    return params, _list(new), velocities, 0.1, 0.9, noise


def _layer_norm(new: Tensors, *, mean: bool) -> tuple[Any, ...]:
    return (
        new.normal(16, 512, 768),
        new.normal(16, 512, 768),
        new.wide(16, 512) if mean else None,
        new.wide(16, 512),
    )


def _channel_norm(
    new: Tensors, *, shared: int, groups: int, space: int
) -> tuple[Any, ...]:
    return (
        new.normal(64, 64, space),
        new.normal(64, 64, space),
        new.wide(shared, groups),
        new.wide(shared, groups),
    )


# batch, heads of queries and of keys, time, width of a head
_ATTENTIONS = {
    "8x12x1024x64": (8, 12, 12, 1024, 64),
    "2x32x2048x128, 8 of keys": (2, 32, 8, 2048, 128),
}


def _attention(
    new: Tensors, *, size: tuple[int, ...], has_gradient: bool = False, order: int = 0
) -> tuple[Any, ...]:
    """Causal. Order 1 has outputs and statistics, 2 a direction before the inputs."""
    batch, heads, groups, time, width = size
    queries = [new.normal(batch, heads, time, width) for _ in range(4)]
    keys = [new.normal(batch, groups, time, width) for _ in range(4)]
    g, direction = queries[:1], (queries[1], *keys[:2])
    inputs = (queries[2], *keys[2:])
    rows = new.wide(2, batch, heads, time) if order else None
    known = (queries[3], rows) if order else ()
    moved = (queries[3], rows[0]) if order == 2 and has_gradient else ()
    scores = Scores(width**-0.5, is_causal=True)
    first = (*g,) if has_gradient else ()
    first += direction if order == 2 else ()
    return *first, *inputs, *known, *moved, scores


def _attentions(**options: Any) -> dict[str, Make]:
    return {
        name: partial(_attention, size=size, **options)
        for name, size in _ATTENTIONS.items()
    }


_LAYER_NORMS = {
    "16x512x768": partial(_layer_norm, mean=True),
    "16x512x768 rms": partial(_layer_norm, mean=False),
}
_CHANNEL_NORMS = {
    "64x64x3136 batch": partial(_channel_norm, shared=1, groups=64, space=3136),
    "64x64x49 group": partial(_channel_norm, shared=64, groups=32, space=49),
}
_WIDE = {"16x512x768": lambda new: (new.normal(16, 512, 768),)}
_LIST = "120 tensors, 85M"
_FLAT = "10M"  # vectors of parameters are not narrower than float32

# Of each op: the arguments by size.
ARGUMENTS: dict[str, dict[str, Make]] = {
    "row_sq_norms": {"512x768->3072": partial(_rows, batch=512, d_in=768, d_out=3072)},
    "sequence_sq_norms": _sequences(True),
    "sequence_fused": _sequences(True, False),
    "gram_sq_norms": _sequences(),
    "direct_sq_norms": _sequences(),
    "sequence_second_moment": _first(_sequences()),
    "sequence_gram": _sequences(),
    "sequence_dots": _sequences(*_DIRECTION),
    "sequence_multi_dots": {
        "16x512x768->3072, 4": lambda new: (
            *_dense(new, size=(16, 512, 768, 3072), then=()),
            list(new.normal(4, 3072, 768)),
        )
    },
    "sequence_gradients": _sequences(),
    "conv_gradients": _convolutions(),
    "conv_sq_norms": _convolutions(True),
    "conv_fused": _convolutions(True, False),
    "conv_second_moment": _first(_convolutions()),
    "conv_gram": _convolutions(),
    "conv_dots": _convolutions(*_DIRECTION),
    "attention": _first(_attentions()),
    "attention_gradients": _attentions(has_gradient=True, order=1),
    "attention_tangent": _first(_attentions(order=2)),
    "attention_gradients_tangent": _attentions(has_gradient=True, order=2),
    "layer_norm_gradients": _LAYER_NORMS,
    "channel_norm_gradients": _CHANNEL_NORMS,
    "sum_over_time": _WIDE,
    "sum_over_space": {"64x64x3136": lambda new: (new.normal(64, 64, 3136),)},
    "product_over_time": {
        "16x512x768": lambda new: (new.normal(16, 512, 768), new.normal(16, 512, 768))
    },
    "embedding_sq_norms": {"16x512 of 50257x768": _tokens},
    "embedding_second_moment": {"16x512 of 50257x768": lambda new: _tokens(new, 50257)},
    "embedding_gram": {"16x512 of 50257x768": _tokens},
    "embedding_dots": {
        "16x512 of 50257x768": lambda new: _tokens(new, new.normal(50257, 768))
    },
    "embedding_gradients": {"16x512 of 50257x768": lambda new: _tokens(new, 50257)},
    "tied_cross": {
        "16x128 of 2048x256": lambda new: (
            new.integers(2048, 16, 128),
            new.normal(16, 128, 256),
            -1,
            new.normal(16, 128, 256),
            new.normal(16, 128, 2048),
        )
    },
    "lanczos_step": {
        _FLAT: lambda new: (*_basis(new, 3), new.normal().double()),
    },
    "power_step": {_FLAT: lambda new: (*_basis(new, 2), 0.5, _basis(new, 1)[0])},
    "dots": {_FLAT: lambda new: (_basis(new, 1)[0], _basis(new, 8))},
    "project_out": {_FLAT: lambda new: (_basis(new, 1)[0], _basis(new, 8))},
    "linear_combinations": {
        _FLAT: lambda new: (_basis(new, 1)[0], _basis(new, 7), new.normal(8, 4))
    },
    "same_values": {_FLAT: lambda new: tuple(_basis(new, 2))},
    "multi_sq_norm": {_LIST: lambda new: (_list(new),)},
    "langevin_step_": {
        _LIST: partial(_langevin, has_velocities=False),
        f"{_LIST} with velocities": partial(_langevin, has_velocities=True),
    },
    "sq_norm": {"3200x3125": lambda new: (new.normal(3200, 3125),)},
    "sample_sq_norms": {"512x3072": lambda new: (new.normal(512, 3072),)},
}


def all_ops() -> dict[str, Op]:
    """Every op of the package by name, its table filled."""
    for module in pkgutil.iter_modules(ops.__path__):
        import_module(f"{ops.__name__}.{module.name}")
    return {n: op for n, op in REGISTRY.items() if not n.startswith("doctest_")}


def cases(backend: str = "triton") -> Iterator[Case]:
    """Every size of the ops that have this implementation for CUDA.

    In bfloat16 where it can be, and the first of them in float32 too.
    """
    for name, op in all_ops().items():
        for i, (size, make) in enumerate(ARGUMENTS.get(name, {}).items()):
            halves = [] if size == _FLAT else [torch.bfloat16]
            wide = [] if i and halves else [torch.float32]
            for dtype in halves + wide:
                case = Case(op, size, dtype, make)
                if case.has(backend):
                    yield case


def launchers(op: Op, dtype: torch.dtype) -> list[str]:
    """Its implementations for CUDA that launch Triton kernels.

    That with PyTorch's products is one where it is not the one of a CPU.
    """
    there = op.backends("cuda", dtype)
    found = [name for name in ("triton",) if name in there]
    ways = [op.on("torch", d, dtype) for d in ("cuda", "cpu") if "torch" in there]
    return found + ["torch"] * (len({*ways}) == 2)


def launched() -> Iterator[Case]:
    """The cases of all of these."""
    for case in cases():
        for backend in launchers(case.op, case.key):
            yield replace(case, backend=backend)
