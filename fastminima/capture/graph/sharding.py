"""Sharded parameters: those of `fully_shard` are read, all others are refused."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "Sharding",
    "find_sharding",
    "is_sharded",
    "local_part",
    "reshard",
    "total_of",
]


class Sharding:
    """The parameters of a model that `fully_shard` cuts into pieces.

    Between the passes the model shows a piece of each parameter, a DTensor. The graph
    of a loss has the whole parameters: plain ones, always the same objects, whose
    memory comes and goes.

    Attributes:
        whole: the tracked parameters as the graph has them, by name.
        held: the parameters that are sharded, as the graph has them, tracked or not.
        meshes: the device meshes that hold pieces.
    """

    def __init__(
        self,
        modules: list[Any],
        whole: dict[str, Any],
        held: list[Tensor],
        meshes: list[Any],
    ) -> None:
        self._modules = modules
        self.whole, self.held = whole, held
        self.meshes = meshes
        self._device = next(iter(whole.values())).device

    def most(self, number: int) -> int:
        """The largest `number` that a rank with a piece came with. All must call it."""
        value = torch.tensor(number, dtype=torch.int64, device=self._device)
        for mesh in self.meshes:
            for dim in range(mesh.ndim):
                dist.all_reduce(value, dist.ReduceOp.MAX, group=mesh.get_group(dim))
        return int(value)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Keep an extra pass from reducing what unsynchronised passes have gathered."""
        kept = list(self._waiting())
        for holder, name, _ in kept:
            setattr(holder, name, None)
        try:
            yield
        finally:
            for holder, name, grad in kept:
                setattr(holder, name, grad)

    @property
    def holds_gradients(self) -> bool:
        """Whether gradients of earlier passes wait to be reduced."""
        return next(self._waiting(), None) is not None

    def _waiting(self) -> Iterator[tuple[Any, str, Tensor]]:
        """Gradients that wait to be reduced: their holders, attributes and values."""
        for p in self.held:
            if p.grad is not None:
                yield p, "grad", p.grad
        # Those in another dtype than the parameters' are where only FSDP sees them.
        seen: set[int] = set()
        for group in itertools.chain.from_iterable(map(_groups, self._modules)):
            for piece in group.fsdp_params:
                grad = piece.unsharded_accumulated_grad
                if grad is not None and id(piece) not in seen:
                    seen.add(id(piece))
                    yield piece, "unsharded_accumulated_grad", grad


def reshard(model: nn.Module | Mapping[str, nn.Parameter]) -> list[Any]:
    """Have every module that `fully_shard` was called on show its pieces; those."""
    # Where it was never imported nothing can have been sharded, and the import is slow.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    if isinstance(model, Mapping):
        for name, p in model.items():
            if isinstance(p, fsdp.FlatParameter):
                raise ValueError(_flat_message(f"{name!r} is a parameter"))
    found = []
    for name, module in _named_modules(model):
        if isinstance(module, fsdp.FullyShardedDataParallel):
            raise ValueError(_flat_message(f"{name or 'The model'} is a module"))
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
            found.append(module)
    return found


def find_sharding(
    modules: list[Any],
    model: nn.Module | Mapping[str, nn.Parameter],
    tracked: Mapping[str, nn.Parameter],
) -> Sharding | None:
    """What becomes of the parameters in a forward pass; None if nothing is sharded.

    The modules are those that `reshard` found. Each is unsharded once, so every rank
    must call this.

    Raises:
        ValueError: for a DTensor that is none of theirs, or stays one.
    """
    whole: dict[str, Any] = {n: p for n, p in tracked.items() if not is_sharded(p)}
    if not modules and len(whole) == len(tracked):
        return None
    pieces = [*tracked.values(), *(p for m in modules for p in m.parameters())]
    meshes = dict.fromkeys(p.device_mesh for p in pieces if is_sharded(p))
    held: dict[int, Tensor] = {}
    names = {id(module): name for name, module in _named_modules(model)}
    for module in modules:
        prefix = names[id(module)] + "." if names[id(module)] else ""
        module.unshard()
        for name, p in module.named_parameters():
            if is_sharded(p):
                continue
            held[id(p)] = p
            if prefix + name in tracked:
                whole.setdefault(prefix + name, p)
        module.reshard()
    for name, p in tracked.items():
        if name not in whole:
            raise ValueError(_message(name, p, is_mapping=isinstance(model, Mapping)))
    whole = {name: whole[name] for name in tracked}
    return Sharding(modules, whole, list(held.values()), list(meshes))


def is_sharded(t: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(t, tensor.DTensor)


def local_part(t: Any) -> tuple[Tensor, int]:
    """This rank's part of a DTensor, and how many ranks hold the same part."""
    replicas = 1
    for dim, placement in enumerate(t.placements):
        if placement.is_replicate():
            replicas *= t.device_mesh.size(dim)
    return t.to_local(), replicas


def total_of(t: Any) -> Tensor:
    """Sum over all elements; of a DTensor, over all ranks, which must all call it."""
    return t.sum().full_tensor() if is_sharded(t) else t.sum()


def _groups(module: Any) -> list[Any]:
    """What FSDP knows of the parameters that one call of `fully_shard` has sharded."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    group = state._fsdp_param_group  # PyTorch before groups of several meshes
    return [] if group is None else [group]


def _named_modules(
    model: nn.Module | Mapping[str, nn.Parameter],
) -> Iterator[tuple[str, Any]]:
    return model.named_modules() if isinstance(model, nn.Module) else iter(())


def _message(name: str, p: Any, *, is_mapping: bool) -> str:
    where = (
        "pass the module that fully_shard was called on instead of a dict"
        if is_mapping
        else "give the probe a module that fully_shard was called on itself"
    )
    return (
        f"Parameter {name!r} is a DTensor with placements {tuple(p.placements)} on a "
        f"mesh of shape {tuple(p.device_mesh.shape)}. Of sharded parameters only those "
        "of fully_shard can be read, because they are whole during the passes: where "
        f"it is one of them, {where}. Tensor parallelism is not supported: freeze the "
        "parameter, or pass a dict of the parameters that are not split."
    )


def _flat_message(what: str) -> str:
    return (
        f"{what} of FullyShardedDataParallel, which joins parameters into flat ones "
        "that no layer uses as they are. Shard the model with "
        "torch.distributed.fsdp.fully_shard, or use DistributedDataParallel."
    )
