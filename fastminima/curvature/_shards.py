"""Parameters that `fully_shard` has spread over ranks, put together for a while."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ._same import same

__all__ = ["Shards", "is_sharded", "local", "sharded_group", "shards_of", "whole"]

_FSDP = "torch.distributed.fsdp"
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def is_sharded(t: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def whole(t: Any) -> Tensor:
    """All of a tensor; of a sharded one all ranks must ask."""
    return t.full_tensor() if is_sharded(t) else t


def local(t: Any) -> Tensor:
    """What this rank holds of a tensor: the same object at each call."""
    return t._local_tensor if is_sharded(t) else t


class Shards:
    """The sharded parameters of a model, and whole copies that graphs are made with.

    The copies are one vector of parameters on each rank, for as long as this lives.
    They are used with the hooks of `fully_shard` away, so nothing is gathered or let go
    of in a pass, and a graph can be differentiated as often as is asked for.

    Raises:
        ValueError: parameters that are spread in another way, or not where the mesh is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._copies: dict[str, nn.Parameter] = {}
        self._seen: dict[str, Tensor] = {}
        self._reshard()
        self.meshes = _meshes(model)

    @property
    def group(self) -> Any:
        """The process group of the ranks that hold shards.

        Raises:
            ValueError: for several meshes, or one of several dimensions, that are not
                the world.
        """
        return _group_of(self.meshes)

    def have_changed(self) -> bool:
        """Whether this rank's shards are not those that were gathered last."""
        self._reshard()
        now = self._named()
        return now.keys() != self._seen.keys() or not all(
            same(local(p).detach(), self._seen[name]) for name, p in now.items()
        )

    def gather(self) -> None:
        """Bring the copies up to date; all ranks must call this."""
        now = self._named()
        self._make_copies(now)
        with torch.no_grad():
            for name, p in now.items():
                self._copies[name].copy_(p.detach().full_tensor())
        self._seen = {n: local(p).detach().clone() for n, p in now.items()}

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Within, the model has the copies, and calls no hooks of `fully_shard`."""
        self._reshard()
        now = self._named()
        self._make_copies(now)
        copies = {id(p): self._copies[name] for name, p in now.items()}
        places = [
            (module._parameters, name, p)
            for module in self._model.modules()
            for name, p in module._parameters.items()
            if id(p) in copies
        ]
        hooks = [
            (live, dict(live))
            for module in self._model.modules()
            for live in (module.__dict__[name] for name in _HOOKS)
            if any(map(_is_theirs, live.values()))
        ]
        try:
            for live, _ in hooks:
                for key in [key for key, hook in live.items() if _is_theirs(hook)]:
                    del live[key]
            for parameters, name, p in places:
                parameters[name] = copies[id(p)]
            yield
        finally:
            for parameters, name, p in places:
                parameters[name] = p
            for live, kept in hooks:
                live.clear()
                live.update(kept)

    def _named(self) -> dict[str, Any]:
        return {n: p for n, p in self._model.named_parameters() if is_sharded(p)}

    def _make_copies(self, now: dict[str, Any]) -> None:
        copies = {name: self._copy(name, p) for name, p in now.items()}
        self._copies = copies

    def _copy(self, name: str, p: Any) -> nn.Parameter:
        """What is there already, if it fits."""
        held = self._copies.get(name)
        if held is None or (held.shape, held.dtype) != (p.shape, p.dtype):
            held = nn.Parameter(
                torch.zeros(p.shape, dtype=p.dtype, device=local(p).device)
            )
            self._seen.pop(name, None)
        held.requires_grad_(p.requires_grad)
        return held

    def _reshard(self) -> None:
        """Have every module show its shards."""
        for module in _sharded_modules(self._model):
            module.reshard()


def shards_of(model: nn.Module) -> Shards | None:
    """The sharded parameters of a model, if it has some.

    Raises:
        ValueError: as `Shards`, and for the flat parameters of
            `FullyShardedDataParallel`.
    """
    fsdp: Any = sys.modules.get(_FSDP)
    if fsdp is not None:
        for name, module in model.named_modules():
            if isinstance(module, fsdp.FullyShardedDataParallel):
                raise ValueError(
                    f"{name or 'The model'} is a module of FullyShardedDataParallel, "
                    "which joins parameters into flat ones. Shard the model with "
                    "torch.distributed.fsdp.fully_shard, or use "
                    "DistributedDataParallel."
                )
    is_spread = any(map(is_sharded, model.parameters()))
    return Shards(model) if is_spread or _sharded_modules(model) else None


def sharded_group(model: nn.Module) -> Any:
    """The process group of the ranks that hold the parameters; None if not sharded.

    Raises:
        ValueError: as `Shards.group`.
    """
    spread: list[Any] = [p for p in model.parameters() if is_sharded(p)]
    meshes = {p.device_mesh: p.device_mesh for p in spread}
    return _group_of(list(meshes.values())) if meshes else None


def _group_of(meshes: list[Any]) -> Any:
    dist: Any = sys.modules["torch.distributed"]
    if all(mesh.size() == dist.get_world_size() for mesh in meshes):
        return dist.group.WORLD
    if len(meshes) == 1 and meshes[0].ndim == 1:
        return meshes[0].get_group()
    shapes = [tuple(mesh.shape) for mesh in meshes]
    raise ValueError(
        f"The model is sharded over meshes of shapes {shapes}. Pass process_group=, "
        "the group of all ranks that hold a part of it."
    )


def _sharded_modules(model: nn.Module) -> list[Any]:
    # Where it was never imported nothing can have been sharded, and the import is slow.
    fsdp: Any = sys.modules.get(_FSDP)
    if fsdp is None:
        return []
    return [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def _meshes(model: nn.Module) -> list[Any]:
    """The device meshes of all sharded parameters, each seen to be readable."""
    theirs = {id(p) for module in _sharded_modules(model) for p in module.parameters()}
    meshes = {}
    for name, p in model.named_parameters():
        if not is_sharded(p):
            continue
        spread: Any = p
        parts = sum(placement.is_shard() for placement in spread.placements)
        if id(p) not in theirs or parts > 1 or _is_partial(spread):
            raise ValueError(
                f"Parameter {name!r} is a DTensor with placements "
                f"{tuple(spread.placements)} on a mesh of shape "
                f"{tuple(spread.device_mesh.shape)}. Of sharded parameters only those "
                "of fully_shard can be put together: pass the module that it was "
                "called on. Tensor parallelism is not supported."
            )
        where, mesh = local(p).device.type, spread.device_mesh
        if where != mesh.device_type:
            raise ValueError(
                f"Parameter {name!r} lies on {where}, and its mesh is of "
                f"{mesh.device_type} devices: it is offloaded. Shard the model without "
                "an offload policy to look at its curvature."
            )
        meshes[mesh] = mesh
    return list(meshes.values())


def _is_partial(spread: Any) -> bool:
    return any(placement.is_partial() for placement in spread.placements)


def _is_theirs(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith(_FSDP)
