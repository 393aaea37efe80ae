"""Where the tensors of tests are, apart from where the package would put its own.

`Placed` puts what tests, and the libraries whose models they use, make without saying
where onto one device, in one dtype. What the package makes is left to PyTorch's
defaults: one that it does not say is on the wrong device, or of the wrong dtype.
"""

import contextlib
import sys
from pathlib import Path

import torch
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,
    _pop_mode_temporarily,
)
from torch.utils._device import _device_constructors

import fastminima

__all__ = ["Placed", "defaults", "lifted"]

_PACKAGE = str(Path(fastminima.__file__).parent)
_TORCH = str(Path(torch.__file__).parent)
_FACTORIES = frozenset(_device_constructors())
_LIKE = {torch.rand_like, torch.randn_like, torch.randint_like, torch.bernoulli}
_DRAWN = {
    *(torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.random_),
    *(torch.Tensor.bernoulli_, torch.Tensor.exponential_),
}


def by_the_package():
    """Whether the code that called PyTorch is the package's."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_TORCH) and name != __file__:
            return name.startswith(_PACKAGE)
        frame = frame.f_back
    return False  # a thread of PyTorch's own


class Placed(TorchFunctionMode):
    """Tensors that tests make: the CPU's values, on `device`, in float32."""

    def __init__(self, device):
        super().__init__()
        self.device = torch.device(device)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in _FACTORIES and kwargs.get("device") is None:
            if by_the_package():
                return self._left_to_the_defaults(func, args, kwargs)
            return self._made(func, args, kwargs)
        if func in _LIKE or func in _DRAWN:
            return self._drawn(func, args, kwargs)
        return func(*args, **kwargs)

    def _left_to_the_defaults(self, func, args, kwargs):
        """What the package makes; an error where the default dtype decides its own."""
        made = func(*args, **kwargs)
        if kwargs.get("dtype") is None and made.dtype == torch.get_default_dtype():
            with _usual_dtype():
                usual = func(*args, **kwargs).dtype
            assert made.dtype == usual, f"{func.__name__}{args} does not say its dtype"
        return made

    def _made(self, func, args, kwargs):
        """On the CPU first, so that random numbers are the same on every device."""
        if args and isinstance(args[0], torch.Tensor) and func is torch.as_tensor:
            return func(*args, **kwargs | {"device": args[0].device})
        wants_grad = kwargs.pop("requires_grad", False)
        kwargs["device"] = "cpu"
        with _usual_dtype():
            made = func(*args, **kwargs).to(self.device)
        return made.requires_grad_() if wants_grad else made

    def _drawn(self, func, args, kwargs):
        like, *rest = args
        if like.device.type in ("cpu", "meta"):
            return func(*args, **kwargs)
        drawn = func(like.detach().cpu(), *rest, **kwargs)
        if func in _DRAWN:
            with torch.no_grad():
                return like.copy_(drawn)
        return drawn.to(like.device)


@contextlib.contextmanager
def lifted():
    """Compiled code as it is without `Placed`, which a compiler would trace."""
    if isinstance(_get_current_function_mode(), Placed):
        with _pop_mode_temporarily():
            yield
    else:
        yield


@contextlib.contextmanager
def defaults(device=None, dtype=None, tests_on="cpu"):
    """PyTorch's defaults, and the tensors of tests where and as they are without."""
    kept = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if device is not None:
            stack.enter_context(torch.device(device))
        stack.enter_context(Placed(tests_on))
        if dtype is not None:
            torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(kept)


class _usual_dtype:
    """float32 by default, as long as a test makes a tensor."""

    def __enter__(self):
        self._kept = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)

    def __exit__(self, *_):
        torch.set_default_dtype(self._kept)
