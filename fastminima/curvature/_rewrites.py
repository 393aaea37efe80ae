"""Functions of PyTorch that give way to what can be differentiated twice."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from ._attention import attend, multi_head_attend
from ._recorded_hooks import registered, retained

__all__ = ["Rewrites"]

_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
# What PyTorch itself computes in another form inside the operators.
_ATTENTION = (
    F.scaled_dot_product_attention,
    F.multi_head_attention_forward,
)


class Rewrites(TorchFunctionMode):
    """The same values, by operations with a right second derivative.

    - `weight_norm`: the fused kernel's second derivative is wrong (PyTorch 2.13 on the
      CPU: not symmetric), so the quotient is written out.
    - `embedding` with `max_norm` rescales rows of the weight itself. Here the rescaled
      weight is another tensor, which takes the place of the weight from there on; the
      gradient goes to the weight unchanged, as it does outside.
    - Attention, where its scores are large or on a GPU, keeps none of them.
    - Recurrent layers: cuDNN's have no second derivative, oneDNN's none forward;
      PyTorch's own are used.
    - `hardsigmoid` has no second derivative; as a clamped line it has one, zero.

    Args:
        is_training: In a training step rows are rescaled as ever, and hooks that are
            put on activations are known to be hooks.

    Attributes:
        met: How often each function was called that is computed in another way.
    """

    def __init__(self, *, is_training: bool = False) -> None:
        super().__init__()
        self._is_training = is_training
        self._rescaled: dict[int, tuple[Tensor, Tensor]] = {}
        self._remembers = False
        self.met: Counter[str] = Counter()

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        """Within (one call of a closure), a rescaled weight stands for the weight."""
        self._remembers = True
        try:
            yield
        finally:
            self._remembers = False
            self._rescaled.clear()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func`, or what stands for it."""
        kwargs = kwargs or {}
        if self._rescaled:
            args = tuple(map(self._now, args))
            kwargs = {name: self._now(value) for name, value in kwargs.items()}
        if self._is_training and func is Tensor.register_hook:
            return registered(*args, **kwargs)
        if self._is_training and func is Tensor.retain_grad:
            return retained(*args, **kwargs)
        if func in _WRITTEN_OUT:
            self.met[func.__name__] += 1
            return _WRITTEN_OUT[func](*args, **kwargs)
        if func in _ATTENTION:
            self.met[func.__name__] += 1
        is_embedding = func is F.embedding or func is F.embedding_bag
        if is_embedding and not self._is_training:
            return self._embedding(func, *args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return multi_head_attend(*args, **kwargs)
        if func in _RECURRENT:
            self.met[func.__name__] += 1
            with _own_recurrence():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _now(self, value: Any) -> Any:
        """What stands for a weight since its rows were rescaled."""
        if type(value) in (list, tuple):
            return type(value)(map(self._now, value))
        known = self._rescaled.get(id(value))
        return value if known is None else known[1]

    def _embedding(
        self, func: Callable[..., Any], input: Tensor, weight: Tensor, *args, **kwargs
    ) -> Tensor:
        max_norm = kwargs.pop("max_norm", args[1] if len(args) > 1 else None)
        if max_norm is None:
            return func(input, weight, *args, **kwargs)
        self.met[f"{func.__name__}(max_norm)"] += 1
        norm_type = kwargs.get("norm_type", args[2] if len(args) > 2 else 2.0)
        args = (args[0], None, *args[2:]) if len(args) > 1 else args
        rescaled = _rescaled(weight, input, max_norm, norm_type)
        if self._remembers:
            known = self._rescaled.values()
            original = next((w for w, now in known if now is weight), weight)
            self._rescaled[id(original)] = original, rescaled
        return func(input, rescaled, *args, **kwargs)


@contextlib.contextmanager
def _own_recurrence() -> Iterator[None]:
    is_enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch._C._set_mkldnn_enabled(is_enabled)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """V g / |v|, the norm over all dimensions but `dim`."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _weight_norm_interface(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """The same, and the norm."""
    return _weight_norm(v, g, dim), torch.norm_except_dim(v, 2, dim)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """The line (x + 3) / 6 between 0 and 1."""
    line = F.hardtanh(input + 3, 0.0, 6.0) / 6
    return input.copy_(line) if inplace else line


_WRITTEN_OUT: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._weight_norm: _weight_norm,
    torch._weight_norm_interface: _weight_norm_interface,
    F.hardsigmoid: _hardsigmoid,
}


def _rescaled(weight: Tensor, ids: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """The weight with the rows in `ids` shortened, its gradient passed on as it is.

    So is a tangent.
    """
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        shift = weight.detach().clone()
        torch.embedding_renorm_(shift, ids.contiguous(), max_norm, norm_type)
        shift.sub_(weight)
    return weight + shift
