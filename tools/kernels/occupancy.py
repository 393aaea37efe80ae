"""How many blocks of a kernel a multiprocessor holds at once, and what limits them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MACHINES", "Machine", "Occupancy", "occupancy"]


@dataclass(frozen=True)
class Machine:
    """Limits of one multiprocessor, and what it does in a clock.

    Source: CUDA C++ Programming Guide, "Compute Capabilities", tables of technical
    specifications and of arithmetic throughput. Tensor rates: the architecture white
    papers, dense bfloat16.
    """

    capability: int
    shared: int  # bytes
    multiprocessors: int  # of the usual part: A100, H100 SXM, B200
    tensor_fmas: int  # bfloat16 multiply-adds a clock
    fp32_lanes: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32


MACHINES = {
    "sm_80": Machine(80, 164 << 10, 108, 1024, 64),
    "sm_90a": Machine(90, 228 << 10, 132, 2048, 128),
    "sm_100": Machine(100, 228 << 10, 148, 4096, 128),
}
_PARTITIONS = 4
_REGISTER_UNIT = 256  # registers are handed to a warp in this many
_SHARED_UNIT = 128
_RESERVED = 1 << 10  # bytes of shared memory that the system takes of each block


@dataclass(frozen=True)
class Occupancy:
    """Blocks at once, the share of all warps that they are, and what runs out first."""

    blocks: int
    share: float
    limit: str


def occupancy(machine: Machine, registers: int, shared: int, warps: int) -> Occupancy:
    """For a block of `warps` warps with `registers` a thread and `shared` bytes."""
    of_warp = _up(max(registers, 1) * 32, _REGISTER_UNIT)
    partition = machine.registers // _PARTITIONS
    fits = {
        "registers": partition // of_warp * _PARTITIONS // warps,
        "shared": machine.shared // _up(shared + _RESERVED, _SHARED_UNIT),
        "warps": machine.warps // warps,
        "blocks": machine.blocks,
    }
    limit = min(fits, key=fits.__getitem__)
    return Occupancy(fits[limit], fits[limit] * warps / machine.warps, limit)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
