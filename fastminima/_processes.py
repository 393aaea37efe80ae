"""What the argument `process_group` means."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["find_group"]


def find_group(process_group: object) -> ProcessGroup:
    """The process group that is meant by "world" or a group.

    Raises:
        ValueError: for anything else, and where there is no process group yet.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"process_group={process_group!r}, but there is no process group. Call "
            "torch.distributed.init_process_group() first (under torchrun), or leave "
            "process_group out."
        )
    if isinstance(process_group, str) and process_group == "world":
        world = dist.group.WORLD
        assert world is not None  # once initialised
        return world
    if not isinstance(process_group, dist.ProcessGroup):
        raise ValueError(
            f'process_group must be None, "world" or a process group that this process '
            f"belongs to, got {process_group!r}."
        )
    return process_group
