"""Ways to make Hessian products, and which of them there is memory for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ._graph import Graph
from ._nodes import nodes_of

__all__ = [
    "ENGINES",
    "EVALUATING",
    "Engine",
    "check_engine",
    "chosen_engine",
    "saved_bytes",
]

# Those that evaluate the loss for each product.
EVALUATING = ("forward_over_reverse", "finite_differences")
Engine = Literal[
    "auto",
    "tangents",
    "cached",
    "recompute",
    "forward_over_reverse",
    "finite_differences",
]
"""How an operator multiplies: its `engine`."""
ENGINES: tuple[Engine, ...] = get_args(Engine)
_MEMINFO = Path("/proc/meminfo")


def check_engine(engine: str, memory: int | None, step: float | None) -> None:
    """ValueError for a name that is none, or options that it does not take."""
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}.")
    if memory is not None and (memory <= 0 or engine != "auto"):
        raise ValueError(
            f"memory, a positive number of bytes, is what engine='auto' decides by; "
            f"got {memory} with engine={engine!r}."
        )
    if step is not None and (not step > 0 or engine != "finite_differences"):
        raise ValueError(
            f"step, a positive number, is for engine='finite_differences'; got {step} "
            f"with engine={engine!r}."
        )


def chosen_engine(graph: Graph, memory: int | None) -> str:
    """What there is memory for: by default as much as is free beside the graph."""
    device = graph.roots[0].device
    if memory is None:
        memory = _free_bytes(device)
    if memory is not None and saved_bytes(graph) > memory:
        return "recompute"
    return "tangents" if device.type == "cpu" else "cached"


def saved_bytes(graph: Graph) -> int:
    """What the graph of a gradient holds, each tensor once, without the parameters.

    What hooks have packed, as checkpoints do, is not unpacked, and not counted. Where
    the gradient has no graph, as by tangents, what stands for that is as large as what
    the loss has.
    """
    found: dict[int, int] = {}
    gradients = [part for part in graph.reached if part is not None]
    own = set()
    for node in nodes_of([*gradients, *graph.roots]):
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            own.add(leaf.untyped_storage().data_ptr())
            continue
        for tensor in _saved(node):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    is_half = not any(part.requires_grad for part in gradients)
    total = sum(size for place, size in found.items() if place not in own)
    return total * (2 if is_half else 1)


def _saved(node: Any) -> Iterator[Tensor]:
    for name in dir(type(node)):
        if not name.startswith("_raw_saved_"):
            continue
        raw: Any = getattr(node, name)
        for one in raw if isinstance(raw, list | tuple) else [raw]:
            value = one.data if one.unpack_hook is None else None
            if isinstance(value, Tensor) and _has_storage(value):
                yield value


def _has_storage(value: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_meta


def _free_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken; None where it is not known."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device)
        held = reserved - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if not _MEMINFO.exists():
        return None
    lines = _MEMINFO.read_text().splitlines()
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None
