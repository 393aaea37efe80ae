"""Runs a user's closure so that it can be differentiated twice and changes nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._random import RandomState
from ._rewrites import Rewrites
from ._same import same

__all__ = [
    "buffers_kept",
    "buffers_of",
    "differentiable",
    "gradient_hooks_off",
    "moved",
    "parameters_kept",
    "put_copies",
    "second_derivatives",
    "unchanged",
]

# A module's hooks on gradients; they would be applied to second derivatives as well.
_GRADIENT_HOOKS = ("_backward_hooks", "_backward_pre_hooks")

Buffers = list[tuple[nn.Module, str, Tensor]]


@contextlib.contextmanager
def unchanged(model: nn.Module, random: RandomState) -> Iterator[None]:
    """Leave the model and the generators as they were.

    Modes, buffers, plain attributes, gradients, flags, hooks; `random` holds the
    generators' states to return to. Inside, buffers are copies (batch norm's running
    statistics move there), no parameter has a gradient (one that appears was made by
    the closure), and hooks on parameters and on gradients of modules are off.
    """
    modules = list(model.modules())
    attributes = [(module, dict(module.__dict__)) for module in modules]
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    hooks = _gradient_hooks(modules, [p for p, *_ in parameters])
    buffers = buffers_of(model)
    try:
        for live, _ in hooks:
            live.clear()
        for parameter, *_ in parameters:
            parameter.grad = None
        put_copies(buffers)
        yield
    finally:
        random.restore()
        for owner, name, buffer in buffers:
            owner._buffers[name] = buffer
        for parameter, grad, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for live, kept in hooks:
            live.clear()
            live.update(kept)
        for module, before in attributes:
            _put_back(module, before)


def _gradient_hooks(
    modules: Sequence[nn.Module], parameters: Sequence[Tensor]
) -> list[tuple[dict, dict]]:
    """Dictionaries of hooks on gradients, each with its contents."""
    live = [p._backward_hooks for p in parameters]
    live += [getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters]
    live += [m.__dict__.get(name) for m in modules for name in _GRADIENT_HOOKS]
    return [(hooks, dict(hooks)) for hooks in live if hooks]


def buffers_of(model: nn.Module) -> Buffers:
    """Each buffer with the module that has it, and its name there."""
    return [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def put_copies(buffers: Buffers) -> None:
    """Put a copy in the place of each buffer; shared ones stay shared."""
    copies: dict[int, Tensor] = {}
    for owner, name, buffer in buffers:
        if id(buffer) not in copies:
            copies[id(buffer)] = buffer.detach().clone()
        owner._buffers[name] = copies[id(buffer)]


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within, buffers are copies: what is checkpointed moves them when it is run again.

    Afterwards the list has each buffer of the modules that moved some, and its copy.
    """
    buffers = buffers_of(model)
    moved: list[tuple[Tensor, Tensor]] = []
    put_copies(buffers)
    try:
        yield moved
    finally:
        copies = [owner._buffers[name] for owner, name, _ in buffers]
        pairs = list(zip(buffers, copies, strict=True))
        # Batch norm moves its statistics without a word, and counts what it has seen.
        movers = {id(owner) for (owner, *_), copy in pairs if _is_written(copy)}
        for (owner, name, buffer), copy in pairs:
            owner._buffers[name] = buffer
            if id(owner) in movers and copy is not None:
                moved.append((buffer, copy))


def _is_written(copy: Tensor | None) -> bool:
    return copy is not None and not copy.is_inference() and copy._version > 0


def _put_back(module: nn.Module, before: dict) -> None:
    """Give a module the attributes it had: none more, and the same objects."""
    attributes = module.__dict__
    for name in [name for name in attributes if name not in before]:
        del attributes[name]
    for name, value in before.items():
        if attributes.get(name) is not value:
            attributes[name] = value


@contextlib.contextmanager
def parameters_kept(
    named: Sequence[tuple[str, Tensor]], closure: str
) -> Iterator[None]:
    """Put back the values of parameters that the closure overwrites, and say so.

    Raises:
        ValueError: A parameter had other values at the end than at the beginning.
    """
    copies = [(name, p, p.detach().clone()) for name, p in named]
    changed: list[str] = []
    try:
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            for name, parameter, copy in copies:
                if not same(parameter.detach(), copy):
                    changed.append(name)
                    parameter.copy_(copy)
    if changed:
        raise ValueError(
            f"{closure} overwrites parameters while it runs: {', '.join(changed[:5])} "
            f"({len(changed)} in all; their values were put back). A derivative by "
            "them has no meaning then. Apply constraints and optimizer steps outside "
            "the closure."
        )


@contextlib.contextmanager
def moved(parameters: Sequence[Tensor], eps: float, seed: int) -> Iterator[None]:
    """Within, every parameter has other values, away by `eps` of each at the most."""
    before = [parameter.data for parameter in parameters]
    generator = torch.Generator("cpu").manual_seed(seed)
    try:
        for parameter, data in zip(parameters, before, strict=True):
            share = torch.rand(
                data.shape, generator=generator, dtype=torch.float32, device="cpu"
            )
            parameter.data = data * (1 + eps * (2 * share - 1).to(data))
        yield
    finally:
        for parameter, data in zip(parameters, before, strict=True):
            parameter.data = data


@contextlib.contextmanager
def differentiable(device: torch.device) -> Iterator[Rewrites]:
    """Everything recorded, by kernels that have a second derivative.

    Fused attention has none, so its plain form is used, and so on (`Rewrites`);
    compiled regions run eagerly; an autocast around the call does not reach inside (one
    inside the closure does).
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(second_derivatives())
        # Casts of weights that were moved must not meet an autocast around the call.
        stack.callback(torch.clear_autocast_cache)
        yield stack.enter_context(Rewrites())


@contextlib.contextmanager
def second_derivatives() -> Iterator[None]:
    """Attention in its plain form, compiled regions eager."""
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_attention)


@contextlib.contextmanager
def gradient_hooks_off(model: nn.Module, others: Sequence[Tensor]) -> Iterator[None]:
    """Within, hooks on gradients of modules, parameters and other leaves are off."""
    leaves = [*model.parameters(), *others]
    hooks = _gradient_hooks(list(model.modules()), leaves)
    try:
        for live, _ in hooks:
            live.clear()
        yield
    finally:
        for live, kept in hooks:
            live.clear()
            live.update(kept)
