"""Runs a user's closure so that it can be differentiated twice and changes nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["RandomState", "differentiable", "unchanged"]


class RandomState:
    """The random number generators' state at one moment, to be returned to."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._cpu = torch.get_rng_state()
        if self._device is not None:
            self._cuda = torch.cuda.get_rng_state(self._device)

    def restore(self) -> None:
        """Set the generators back."""
        torch.set_rng_state(self._cpu)
        if self._device is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


@contextlib.contextmanager
def unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Leave mode, buffers, gradients, flags, hooks and generators as they were.

    Inside, buffers are copies (batch norm's running statistics move there) and hooks on
    parameters are off: they would be applied to second derivatives as if to gradients.
    """
    modules = list(model.modules())
    modes = [module.training for module in modules]
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    hooks = [(h, dict(h)) for p, *_ in parameters if (h := p._backward_hooks)]
    buffers = [
        (m, n, b) for m in modules for n, b in m._buffers.items() if b is not None
    ]
    random = RandomState(device)
    try:
        for live, _ in hooks:
            live.clear()
        _put_copies(buffers)
        yield
    finally:
        random.restore()
        for owner, name, buffer in buffers:
            owner._buffers[name] = buffer
        for parameter, grad, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for live, kept in hooks:
            live.update(kept)
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _put_copies(buffers: list[tuple[nn.Module, str, Tensor]]) -> None:
    """Put a copy in the place of each buffer; shared ones stay shared."""
    copies: dict[int, Tensor] = {}
    for owner, name, buffer in buffers:
        if id(buffer) not in copies:
            copies[id(buffer)] = buffer.detach().clone()
        owner._buffers[name] = copies[id(buffer)]


@contextlib.contextmanager
def differentiable(device: torch.device) -> Iterator[None]:
    """Everything recorded, by kernels that have a second derivative.

    Fused attention has none, so its plain form is used; compiled regions run eagerly;
    an autocast around the call does not reach inside (one inside the closure does).
    """
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_attention)
