"""Rows about kernels, a table of them, and what got worse against a baseline."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.kernels.cases import Case, Tensors
from tools.kernels.compile import Compiled, compile_cuda, compiling
from tools.kernels.loops import hot_loop
from tools.kernels.occupancy import MACHINES, occupancy
from tools.kernels.sass import Function, count, disassemble

__all__ = ["Row", "cuda_rows", "readable", "regressions", "table", "triton_rows"]

_RESERVED_SHARED = {"sm_80": 0, "sm_90a": 1024, "sm_100": 1024}
# Kernels of CUDA files that state no bound are taken to run with this many threads.
_THREADS = 256


@dataclass(frozen=True)
class Row:
    """One kernel of one case on one architecture."""

    case: str
    architecture: str
    kernel: str
    blocks: int | None  # of the grid
    warps: int
    registers: int
    spills: int  # instructions
    shared: int  # bytes
    resident: int  # blocks that a multiprocessor holds at once
    occupancy: float
    limit: str
    tensor: int  # tensor-core instructions; the next three count instructions too
    wide_loads: int  # 16 bytes a thread, or a bulk copy
    narrow_loads: int
    async_copies: int
    instructions: int
    loop: int  # instructions of the hot loop
    loop_fp32: int  # of them: float32 multiplications, additions or both in one
    code: str | None = None  # digest of a Triton kernel's IR and options

    @property
    def key(self) -> str:
        return _key(self.case, self.kernel, self.architecture)

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


def triton_rows(
    cases: Iterable[Case], architecture: str, old: Mapping[str, dict] | None = None
) -> Iterator[Row]:
    """Compile every launch of the cases; equal kernels of one case make one row.

    Kernels whose code is that of a row in `old`, made by the same version of Triton,
    have that row's counts: to compile and disassemble one takes most of a second.
    """
    known: dict[bytes, list[Function]] = {}
    counted = {
        row["code"]: row
        for key, row in (old or {}).items()
        if row.get("code") and key.endswith(f"| {architecture}")
    }
    for case in cases:
        with compiling(architecture, counted) as found:
            case.launch(Tensors("meta", case.dtype))
        for place, kernel in enumerate({k.code: k for k in found}.values(), start=1):
            if kernel.code in counted:
                yield Row(
                    case=case.label,
                    architecture=architecture,
                    kernel=_named(place, kernel),
                    **counted[kernel.code] | {"blocks": kernel.blocks},
                )
                continue
            if kernel.cubin not in known:
                reserved = _RESERVED_SHARED[architecture]
                known[kernel.cubin] = disassemble(kernel.cubin, reserved)
            yield _row(case.label, architecture, kernel, place, known[kernel.cubin])


def _row(
    case: str,
    architecture: str,
    kernel: Compiled,
    place: int,
    functions: list[Function],
) -> Row:
    (function,) = (f for f in functions if f.symbol == kernel.symbol)
    return _measure(
        case,
        architecture,
        _named(place, kernel),
        function,
        blocks=kernel.blocks,
        warps=kernel.warps,
        shared=kernel.dynamic_shared,
        code=kernel.code,
    )


def _key(case: str, kernel: str, architecture: str) -> str:
    return f"{case} | {kernel} | {architecture}"


def _named(place: int, kernel: Compiled) -> str:
    return f"{place}: {kernel.name.rpartition('.')[2]}"


def cuda_rows(nvcc: str, source: Path, architecture: str) -> Iterator[Row]:
    """Compile a .cu file; dynamic shared memory is the launch's and not in it."""
    cubin = compile_cuda(nvcc, source, architecture)
    for function in disassemble(cubin, _RESERVED_SHARED[architecture]):
        yield _measure(
            f"cuda/{source.name}",
            architecture,
            readable(function.symbol),
            function,
            blocks=None,
            warps=-(-(function.max_threads or _THREADS) // 32),
            shared=0,
        )


def readable(symbol: str) -> str:
    """The name and template arguments in a mangled C++ name.

    As it is where arguments are more than letters and numbers: it must stay distinct.

    Source: Itanium C++ ABI, "Mangling": <length><identifier>, I <arguments> E.
    """
    rest = symbol.removeprefix("_ZN") if symbol.startswith("_ZN") else symbol[2:]
    name = ""
    while found := re.match(r"\d+", rest):
        end = found.end() + int(found[0])
        name, rest = rest[found.end() : end], rest[end:]
    if not name or not symbol.startswith("_Z"):
        return symbol
    arguments = re.match(r"I((?:Li\d+E|Lb[01]E|[a-z])+)E", rest)
    if not arguments:
        return symbol if rest.startswith("I") else name
    words = re.findall(r"L[ib](\d+)E|([a-z])", arguments[1])
    return f"{name}<{', '.join(number or word for number, word in words)}>"


def _measure(
    case: str,
    architecture: str,
    kernel: str,
    function: Function,
    *,
    blocks: int | None,
    warps: int,
    shared: int,
    code: str | None = None,
) -> Row:
    found = count(function.instructions)
    shared += function.static_shared
    loop = count(hot_loop(function.instructions))
    held = occupancy(MACHINES[architecture], function.registers, shared, warps)
    return Row(
        case=case,
        architecture=architecture,
        kernel=kernel,
        blocks=blocks,
        warps=warps,
        registers=function.registers,
        spills=found["spill"],
        shared=shared,
        resident=held.blocks,
        occupancy=round(held.share, 3),
        limit=held.limit,
        tensor=found["tensor"],
        wide_loads=found["load.16"] + found["async.16"] + found["bulk"],
        narrow_loads=found["load.8"] + found["load.narrow"] + found["async.narrow"],
        async_copies=found["async.16"] + found["async.narrow"] + found["bulk"],
        instructions=found["all"],
        loop=loop["all"],
        loop_fp32=loop["fp32"],
        code=code,
    )


def regressions(old: dict, new: Row, *, same_compiler: bool) -> Iterator[str]:
    """A sentence for each way in which a kernel is worse than its baseline row.

    Another version of the compiler hands out registers and shared memory in its own
    way: between versions only tensor cores and wide loads are compared.
    """
    if old["tensor"] and not new.tensor:
        yield f"{new.key} lost its tensor-core instructions ({old['tensor']} -> 0)."
    if old["wide_loads"] and not new.wide_loads:
        yield f"{new.key} lost its 16-byte loads ({old['wide_loads']} -> 0)."
    elif _narrowed(old, new):
        yield (
            f"{new.key} loads less in 16 bytes: {old['wide_loads']} wide and "
            f"{old['narrow_loads']} narrow -> {new.wide_loads} and {new.narrow_loads}."
        )
    if not same_compiler:
        return
    if old["async_copies"] and not new.async_copies:
        yield f"{new.key} lost its async copies ({old['async_copies']} -> 0)."
    if new.resident * new.warps < old["resident"] * old["warps"]:
        yield (
            f"{new.key} has a lower occupancy: {old['resident']} blocks of "
            f"{old['warps']} warps -> {new.resident} of {new.warps} "
            f"({new.registers} registers, {new.shared} bytes shared)."
        )


def _narrowed(old: dict, new: Row) -> bool:
    """Whether the share of wide loads fell to less than half of what it was."""
    before = old["wide_loads"] / max(1, old["wide_loads"] + old["narrow_loads"])
    now = new.wide_loads / max(1, new.wide_loads + new.narrow_loads)
    return now < before / 2


_COLUMNS = {
    "blocks": "blocks",
    "warps": "warps",
    "regs": "registers",
    "spill": "spills",
    "shared": "shared",
    "held": "resident",
    "occ": "occupancy",
    "limit": "limit",
    "tensor": "tensor",
    "16B": "wide_loads",
    "narrow": "narrow_loads",
    "async": "async_copies",
    "instr": "instructions",
    "loop": "loop",
}


def table(rows: Iterable[Row]) -> str:
    """The rows as text, a line each."""
    rows = list(rows)
    names = [f"{row.case}, {row.kernel}" for row in rows]
    wide = min(72, max(map(len, names), default=0))
    titles = "".join(f"{title:>7}" for title in _COLUMNS)
    head = f"{'case, kernel':{wide}} {'arch':>6}{titles}"
    lines = [head]
    for name, row in zip(names, rows, strict=True):
        values = (getattr(row, field) for field in _COLUMNS.values())
        cells = "".join(f"{'-' if v is None else str(v)[:6]:>7}" for v in values)
        lines.append(f"{name[:wide]:{wide}} {row.architecture:>6}{cells}")
    return "\n".join(lines)
