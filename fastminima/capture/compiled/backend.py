"""`compile`: torch.compile with backends whose backward graphs are marked."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from ..graph.replay import keeping_graphs, note, runnable, versions_of
from . import operators as operators  # compiled code calls them

__all__ = ["compile", "inductor"]

_numbers = itertools.count(1)


def compile(
    model: nn.Module | Callable[..., Any] | None = None,
    *,
    backend: str | Callable[..., Any] | None = None,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **others: Any,
) -> Any:
    """`torch.compile` such that `GradientProbe` can read the model.

    Operators are inserted into the backward graph before it is compiled, which show the
    probe what each gradient of a parameter is computed from. There is no graph break,
    and steps that are probed and steps that are not run the same code. The training
    gradients are the same on both.

    That is done for the backends "inductor", "aot_eager" and
    "aot_eager_decomp_partition". Under another one, and for a region where a gradient
    is computed by an operation that is not known here, a warning says why, and each
    probed step runs the region once more, uncompiled, forward and backward. Such
    regions must not draw random numbers (dropout) or change buffers.

    Args:
        model: what to compile: a module, or a function of a step that returns the
            losses of the samples. Without it a decorator is returned.
        backend: the backend that really compiles, by name or as a function; "inductor"
            unless one is named.
        mode: as for `torch.compile`, for "inductor".
        options: passed to the backend; for "inductor" as its configuration.
        others: `fullgraph`, `dynamic`, `disable` and whatever else `torch.compile`
            takes.

    Raises:
        ValueError: for a `mode` with another backend than "inductor".

    Example:
        >>> import torch, fastminima as fm
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh())
        >>> fast = fm.compile(model, backend="aot_eager")
        >>> stats = fm.GradientProbe(model).backward(fast(torch.randn(5, 4)).sum(1))
        >>> stats.sq_norms.shape
        torch.Size([5])
    """
    if model is None:
        return partial(compile, backend=backend, mode=mode, options=options, **others)
    return torch.compile(
        model,
        backend=_Backend(backend or "inductor", mode, options),
        **others,
    )


def inductor(
    graph: Any,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """What `compile` compiles with, as a backend of `torch.compile`.

    Where the package is installed, `torch.compile(model, backend="fastminima")` and
    `module.compile(backend="fastminima")` find it by its name.

    Args:
        graph: of a region.
        example_inputs: what it may be given.
        mode: as for `compile`.
        options: as for `compile`.
    """
    return _Backend("inductor", mode, options)(graph, example_inputs)


class _Backend:
    """Compiles with another backend and notes each call on the node it leaves."""

    def __init__(
        self,
        backend: str | Callable[..., Any],
        mode: str | None,
        options: dict[str, Any] | None,
    ) -> None:
        if mode is not None and backend != "inductor":
            raise ValueError(
                f"mode={mode!r} is for backend='inductor', and this is {backend!r}. "
                "Pass `options=` instead."
            )
        self._compile = _compiler(backend, mode, options)

    def __call__(self, graph: Any, example_inputs: list[Any]) -> Callable[..., Any]:
        with keeping_graphs():
            run = self._compile(graph, example_inputs)
        number, again = next(_numbers), runnable(graph)

        def noted(*inputs: Any) -> Any:
            versions = versions_of(inputs)
            outputs = run(*inputs)
            note(outputs, again, number, inputs, versions)
            return outputs

        return noted


_Compiler = Callable[[Any, list[Any]], Callable[..., Any]]


def _compiler(
    backend: str | Callable[..., Any], mode: str | None, options: dict[str, Any] | None
) -> _Compiler:
    """What compiles a graph for example inputs."""
    if backend == "inductor":
        return _with_inductor(mode, options)
    if backend in ("aot_eager", "aot_eager_decomp_partition"):
        return _aot(decomposed=backend != "aot_eager")
    from torch._dynamo.backends.registry import lookup_backend

    compiler = lookup_backend(backend) if isinstance(backend, str) else backend
    given = {"options": options} if options else {}
    return lambda graph, inputs: compiler(graph, inputs, **given)


def _with_inductor(mode: str | None, options: dict[str, Any] | None) -> _Compiler:
    # As torch.compile itself does it, with its messages for options that are not.
    own = torch._TorchCompileInductorWrapper(mode, options, None)

    def compiled(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
        from torch._inductor import config

        from .inserting import Inputs, Marking

        key = "post_grad_custom_pre_pass"
        before = own.config.get(key, getattr(config, key))
        marking = Marking(Inputs.of(graph, inputs), before)
        mine = copy(own)
        mine.config = own.config | {key: marking}
        run: Any = mine(graph, list(inputs))
        return run

    return compiled


def _aot(*, decomposed: bool) -> _Compiler:
    def compiled(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
        from torch._dynamo.backends.common import aot_autograd
        from torch._dynamo.backends.debugging import boxed_nop
        from torch._functorch.partitioners import min_cut_rematerialization_partition
        from torch._inductor.decomposition import select_decomp_table

        from .inserting import Inputs, mark_uses

        given = Inputs.of(graph, inputs)

        def backward(compiling: Any, example_inputs: Any) -> Any:
            mark_uses(compiling.graph, given)
            compiling.recompile()
            return boxed_nop(compiling, example_inputs)

        more: dict[str, Any] = {}
        if decomposed:
            more["decompositions"] = select_decomp_table
        return aot_autograd(
            fw_compiler=boxed_nop,
            bw_compiler=backward,
            partition_fn=min_cut_rematerialization_partition,
            keep_inference_input_mutations=True,
            **more,
        )(graph, inputs)

    return compiled
