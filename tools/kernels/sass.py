"""Reads the machine code of kernels: resources, instructions and their classes."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from math import prod
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "Function",
    "Instruction",
    "count",
    "disassemble",
    "parse",
]


class Instruction(NamedTuple):
    """One line of the listing; `label` where something jumps to it."""

    label: str | None
    opcode: str
    operands: str  # with the predicate in front


class Function(NamedTuple):
    """One kernel of a cubin."""

    symbol: str
    registers: int
    static_shared: int
    max_threads: int | None
    instructions: list[Instruction]


_LINE = re.compile(
    r"^\s+/\*[0-9a-f]+\*/\s+(@!?U?P[\dT]+\s+)?([A-Z][A-Za-z0-9_.]*)(.*?);?\s*(?:/\*.*)?$"
)
_LABEL = re.compile(r"^\s*(\.L_[\w.]+):")
_SECTION = re.compile(r"^\s*\.text\.([\w$.]+):")
_USAGE = re.compile(r"Function ([\w$.]+):\s+REG:(\d+) STACK:\d+ SHARED:(\d+) LOCAL:\d+")

# The first pattern that fits names the class.
_CLASSES = {
    "tensor": r"[HIQBDO]MMA|[HIQB]GMMA|UTC\w*MMA",
    "async.16": r"LDGSTS.*\.128",
    "async.narrow": r"LDGSTS",
    "bulk": r"UTMALDG|UBLKCP",
    "load.16": r"LDG.*\.(128|256)",
    "load.8": r"LDG.*\.64",
    "load.narrow": r"LDG(?!DEPBAR)",
    "store.16": r"STG.*\.(128|256)",
    "store.narrow": r"STG",
    "spill": r"STL|LDL",
    "shared": r"LDS|STS|STSM|LDSM",
    "fp32": r"FFMA|FMUL|FADD",
    "fp64": r"DFMA|DMUL|DADD",
    "special": r"MUFU",
    "shuffle": r"SHFL",
    "barrier": r"BAR|SYNCS|WARPSYNC",
    "atomic": r"ATOM|RED\b|REDG",
}
_PATTERNS = {name: re.compile(pattern) for name, pattern in _CLASSES.items()}


def count(instructions: list[Instruction]) -> Counter[str]:
    """Instructions by class, and "all" of them but padding."""
    found: Counter[str] = Counter()
    for instruction in instructions:
        if instruction.opcode == "NOP":
            continue
        found["all"] += 1
        for name, pattern in _PATTERNS.items():
            if pattern.match(instruction.opcode):
                found[name] += 1
                break
    return found


def disassemble(cubin: bytes, reserved_shared: int) -> list[Function]:
    """The kernels of a cubin.

    Args:
        cubin: the machine code.
        reserved_shared: bytes that the system adds to each kernel's static count.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        listing = _say(_tool("nvdisasm"), str(path))
        usage = _say(_tool("cuobjdump"), "-res-usage", str(path))
    bodies = parse(listing)
    threads = _max_threads(listing)
    return [
        Function(
            symbol,
            int(registers),
            max(0, int(shared) - reserved_shared),
            threads.get(symbol),
            bodies[symbol],
        )
        for symbol, registers, shared in _USAGE.findall(usage)
        if symbol in bodies
    ]


def parse(listing: str) -> dict[str, list[Instruction]]:
    """The instructions of each function in nvdisasm's text."""
    functions: dict[str, list[Instruction]] = {}
    body: list[Instruction] | None = None
    label = None
    for line in listing.splitlines():
        if found := _SECTION.match(line):
            body = functions.setdefault(found[1], [])
        elif found := _LABEL.match(line):
            label = found[1]
        elif body is not None and (found := _LINE.match(line)):
            operands = (found[1] or "") + found[3].strip()
            body.append(Instruction(label, found[2], operands))
            label = None
    return functions


def _max_threads(listing: str) -> dict[str, int]:
    """Threads of a block that a kernel promises not to pass (__launch_bounds__)."""
    found = {}
    for part in listing.split("\t.section\t.nv.info.")[1:]:
        words = part.partition("EIATTR_MAX_THREADS\n")[2].split("EIATTR", 1)[0]
        if sizes := re.findall(r"\.word\s+0x([0-9a-f]+)", words):
            found[part.split(",", 1)[0]] = prod(int(size, 16) for size in sizes)
    return found


def _tool(name: str) -> str:
    """nvdisasm or cuobjdump: of the path, else the one that Triton brings along."""
    if given := os.environ.get(f"TRITON_{name.upper()}_PATH"):
        return given
    spec = importlib.util.find_spec("triton")
    if spec and spec.submodule_search_locations:
        root = Path(spec.submodule_search_locations[0])
        if (ours := root / "backends/nvidia/bin" / name).exists():
            return str(ours)
    if elsewhere := shutil.which(name):
        return elsewhere
    raise FileNotFoundError(
        f"{name} was not found. Triton brings it along, and so does the CUDA toolkit."
    )


def _say(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr[-1000:]}")
    return done.stdout
