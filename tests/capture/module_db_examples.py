"""The examples of `torch.testing`'s module_db, and where the batch is in each of them.

An axis is (dimension, rows a sample takes in it) or None, where a tensor has no batch
and serves every sample; the axes of an example are decided here by the module's
documentation, never by a size.
"""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.common_modules import module_db

Axis = tuple[int, int] | None


@dataclasses.dataclass
class Example:
    """A module with an input of it.

    Attributes:
        args, kwargs: what the module is called with; nested tuples of tensors.
        axes: of every tensor in `args` and `kwargs`, in order.
        outputs: of every tensor that the module returns.
        count: how many samples there are.
        scalar: "mean" or "sum" where the module returns a scalar loss.
    """

    label: str
    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    axes: list[Axis]
    outputs: list[Axis]
    count: int
    scalar: str | None = None

    def losses(self, args: tuple, kwargs: dict) -> Tensor:
        """A loss for each sample, different in each of a sample's outputs."""
        if self.scalar is not None:
            return self._parts_of_scalar(args, kwargs)
        found = tensors_of(self.module(*args, **kwargs))
        rows = [
            rows_of(out, axis) for out, axis in zip(found, self.outputs, strict=True)
        ]
        out = torch.cat(rows, 1)
        weight = torch.linspace(
            0.5, 1.5, out.shape[1], dtype=out.dtype, device=out.device
        )
        return (out * weight + 0.3).square().sum(1)

    def _parts_of_scalar(self, args: tuple, kwargs: dict) -> Tensor:
        """What each sample adds to the scalar, times the batch size for a mean."""
        apart = copy.copy(self.module)
        apart.reduction, apart.options = "none", None
        parts = rows_of(apart(*args, **kwargs), self.outputs[0]).sum(1)
        if self.scalar == "sum":
            return parts
        # A weighted mean divides by the weights of all samples' targets.
        whole = rows_of(apart(*self.args, **self.kwargs), self.outputs[0]).sum()
        weights = (whole / self.module(*self.args, **self.kwargs)).item()
        return parts * (self.count / weights)

    def sample(self, n: int) -> tuple[tuple, dict]:
        """The arguments for sample n alone, as a batch of one."""
        axes = iter(self.axes)

        def of_sample(t: Tensor) -> Tensor:
            axis = next(axes)
            if axis is None:
                return t
            dim, rows = axis
            # cuDNN takes no states [layers, 1, d] cut out of those of a batch.
            return t.narrow(dim, n * rows, rows).contiguous()

        return mapped(of_sample, self.args), mapped(of_sample, self.kwargs)

    def double(self) -> "Example":
        """The same in float64."""

        def doubled(t: Tensor) -> Tensor:
            return t.double() if t.is_floating_point() else t

        return dataclasses.replace(
            self,
            module=copy.deepcopy(self.module).double(),
            args=mapped(doubled, self.args),
            kwargs=mapped(doubled, self.kwargs),
        )


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`function` of every tensor in nested tuples and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return tuple(mapped(function, v) for v in value)
    if isinstance(value, dict):
        return {key: mapped(function, v) for key, v in value.items()}
    return value


def tensors_of(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(lambda t: found.append(t) or t, value)
    return found


def rows_of(out: Tensor, axis: Axis) -> Tensor:
    """`[batch, everything else]`."""
    if axis is None:
        return out.reshape(1, out.numel())
    dim, rows = axis
    out = out.movedim(dim, 0)
    batch = len(out) // rows
    return out.reshape(batch, out.numel() // max(batch, 1))


_LOSS = getattr(nn, "LinearCrossEntropyLoss", None)  # since PyTorch 2.13
# Rank of the first input when it has a batch.
_RANKS = {
    **dict.fromkeys([nn.Linear, nn.Bilinear, _LOSS], 2),
    **dict.fromkeys([nn.RNNCell, nn.GRUCell, nn.LSTMCell], 2),
    **dict.fromkeys([nn.RNN, nn.GRU, nn.LSTM, nn.MultiheadAttention], 3),
    **dict.fromkeys([nn.Transformer, nn.TransformerEncoder], 3),
    **dict.fromkeys([nn.TransformerEncoderLayer, nn.TransformerDecoderLayer], 3),
    **dict.fromkeys([nn.Conv1d, nn.ConvTranspose1d], 3),
    **dict.fromkeys([nn.Conv2d, nn.ConvTranspose2d], 4),
    **dict.fromkeys([nn.Conv3d, nn.ConvTranspose3d], 5),
}
_RECURRENT = (nn.RNN, nn.GRU, nn.LSTM)
_ATTENTION = (
    *(nn.MultiheadAttention, nn.Transformer, nn.TransformerEncoder),
    *(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
)


def has_batch(module: nn.Module, first: Tensor) -> bool:
    if isinstance(module, nn.PReLU):
        return first.dim() > 1
    return first.dim() == _RANKS.get(type(module), first.dim())


def is_batch_first(module: nn.Module) -> bool:
    if isinstance(module, nn.TransformerEncoder):
        module = module.layers[0]
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        module = module.self_attn
    return module.batch_first


def input_axis(module: nn.Module, key: int | str, rank: int) -> Axis:
    """Where the batch of an argument is; `rank` is its rank with a batch."""
    if isinstance(module, _RECURRENT):
        return (0 if is_batch_first(module) and key == 0 else 1), 1
    if not isinstance(module, _ATTENTION):
        return 0, 1
    if not isinstance(key, str):
        return (0 if is_batch_first(module) else 1), 1
    if "padding" in key:
        return 0, 1
    if rank == 3:  # a mask for each sample and head
        return 0, module.num_heads
    return None


def output_axes(module: nn.Module) -> list[Axis]:
    if isinstance(module, _RECURRENT):
        states = 2 if isinstance(module, nn.LSTM) else 1
        return [(0 if module.batch_first else 1, 1), *[(1, 1)] * states]
    if isinstance(module, nn.LSTMCell):
        return [(0, 1)] * 2
    if isinstance(module, _ATTENTION):
        first = (0 if is_batch_first(module) else 1), 1
        weights = isinstance(module, nn.MultiheadAttention)
        return [first, (0, 1)] if weights else [first]
    return [(0, 1)]


def described(label: str, module: nn.Module, args: tuple, kwargs: dict) -> Example:
    """The example with its axes."""
    first = tensors_of((args, kwargs))[0]
    batched = has_batch(module, first)
    axes: list[Axis] = [
        input_axis(module, key, t.dim()) if batched else None
        for key, value in [*enumerate(args), *kwargs.items()]
        for t in tensors_of(value)
    ]
    outputs = output_axes(module) if batched else [None] * len(output_axes(module))
    count = first.shape[axes[0][0]] if axes[0] is not None else 1
    reduction = getattr(module, "reduction", "none")
    scalar = None if reduction == "none" else reduction
    return Example(label, module, args, kwargs, axes, outputs, count, scalar)


def with_batch(example: Example, count: int) -> Example:
    """An example without a batch as `count` different samples."""
    module = example.module

    def grown(key: int | str, t: Tensor) -> Tensor:
        is_folded = isinstance(key, str) and "padding" not in key
        axis = input_axis(module, key, t.dim() + (not is_folded))
        if axis is None:
            return t
        samples = [varied(t, n) for n in range(count)]
        return torch.cat(samples) if axis[1] > 1 else torch.stack(samples, axis[0])

    args = tuple(
        mapped(lambda t, key=key: grown(key, t), value)
        for key, value in enumerate(example.args)
    )
    kwargs = {
        key: mapped(lambda t, key=key: grown(key, t), value)
        for key, value in example.kwargs.items()
    }
    label = f"{example.label}, as a batch of {count}"
    return described(label, module, args, kwargs)


def varied(t: Tensor, n: int) -> Tensor:
    """Sample n made from another."""
    if t.is_floating_point():
        return t * (1 - 0.3 * n) + 0.1 * n
    return t.roll(n, -1) if t.dim() else (t + n) % 4


def examples(
    name: str, training: bool, device: torch.device | str = "cpu"
) -> Iterator[Example]:
    """All examples of one entry of module_db that have parameters.

    They are made on the CPU, so that they are the same on every device.
    """

    def placed(value: Any) -> Any:
        return mapped(lambda t: t.to(device), value)

    info = next(info for info in module_db if info.name == name)
    torch.manual_seed(0)
    found = info.module_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=training
    )
    for number, given in enumerate(found):
        if given.forward_input is None:
            continue
        built, called = given.constructor_input, given.forward_input
        with warnings.catch_warnings(), torch.device("cpu"):
            warnings.simplefilter("ignore")  # nested tensors, experimental layers
            module = info.module_cls(*built.args, **built.kwargs).train(training)
            if info.is_lazy:
                module(*called.args, **called.kwargs)
        if not list(module.parameters()):
            continue
        example = described(
            f"{name} {number}",
            module.to(device),
            placed(tuple(called.args)),
            placed(dict(called.kwargs)),
        )
        yield example
        # A loss of a scalar, and PReLU of one, have examples with a batch besides.
        is_single = example.axes[0] is None and example.args[0].dim() > 0
        if is_single and type(module) is not _LOSS:
            yield with_batch(example, 3)


NAMES = sorted(info.name for info in module_db)
