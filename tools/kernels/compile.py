"""Compiles what host code launches, on a machine without a GPU.

Launchers run on `meta` tensors of real shape under a stand-in for the driver: each
launch in them is compiled with the specialisation that a real one would get, and noted
instead of being run.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tools.kernels.occupancy import MACHINES

__all__ = [
    "Compiled",
    "code_digest",
    "compile_cuda",
    "compiling",
    "find_nvcc",
    "stand_in_device",
]

_PLACE = re.compile(r' loc\((?:"[^"]*"\(#loc\d*\)|#loc\d*|unknown)\)')
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")


@dataclass(frozen=True)
class Compiled:
    """One kernel as machine code, with how it is launched.

    Of one whose code is known there is no machine code, and what comes with it is zero.
    """

    name: str
    blocks: int | None  # of the grid; None where only the launch would tell
    code: str  # digest of what the compiler makes machine code from
    symbol: str = ""
    warps: int = 0
    dynamic_shared: int = 0
    cubin: bytes = b""


class _KnownCode(Exception):
    """Leaves the compiler, before the stages that take long, with the digest."""


@contextmanager
def compiling(
    architecture: str, known: Collection[str] = ()
) -> Iterator[list[Compiled]]:
    """Compile each Triton launch for an architecture and add it to the list.

    Kernels with a digest in `known` are noted without machine code.
    """
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found: list[Compiled] = []
    run, add_stages = JITFunction.run, CUDABackend.add_stages

    def compile_only(self, *args, grid, warmup, **options):
        size = grid
        if callable(grid):
            names = [parameter.name for parameter in self.params]
            size = grid(dict(zip(names, args, strict=False)) | options)
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **options)
            if hasattr(kernel, "result"):
                kernel = kernel.result()
        except _KnownCode as code:
            found.append(Compiled(self.__name__, prod(size), str(code)))
            return None
        found.append(_compiled(self.__name__, kernel, size))
        return kernel

    def add_stages_with_a_way_out(self, stages, options, *language):
        add_stages(self, stages, options, *language)
        stages["ttir"] = _digested(stages["ttir"], options, known)

    before = driver._active
    driver.set_active(_stand_in(architecture))
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(CUDABackend, "add_stages", add_stages_with_a_way_out),
            stand_in_device(architecture),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield found
    finally:
        driver._active = before


def _digested(stage: Any, options: Any, known: Collection[str]) -> Any:
    """The compiler's first stage, which goes no further with what is known."""

    def run(source: Any, metadata: dict[str, Any]) -> Any:
        module = stage(source, metadata)
        code = code_digest(str(module), options)
        if code in known:
            raise _KnownCode(code)
        return module

    return run


def code_digest(ir: str, options: Any) -> str:
    """Of Triton's first IR, and of the options of the stages behind it.

    Machine code depends on nothing else but the architecture and Triton's version.
    Places in files are left out: the same code in another place is the same.
    """
    lines = [_PLACE.sub("", x) for x in ir.splitlines() if not x.startswith("#loc")]
    settings = [f"{name}={getattr(options, name, None)}" for name in _OPTIONS]
    return hashlib.sha256("\n".join([*lines, *settings]).encode()).hexdigest()[:16]


def _compiled(name: str, kernel: Any, grid: Sequence[int]) -> Compiled:
    meta = kernel.metadata
    return Compiled(
        name,
        prod(grid),
        code_digest(kernel.asm["ttir"], meta),
        meta.name,
        meta.num_warps,
        meta.shared,
        kernel.asm["cubin"],
    )


def _stand_in(architecture: str) -> Any:
    """A driver that knows its target and nothing else."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    capability = MACHINES[architecture].capability

    class StandIn(DriverBase):
        is_active = classmethod(lambda cls: True)

        def map_python_to_cpp_type(self, ty):
            return ty

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_active_torch_device(self):
            return torch.device("meta")

        def get_benchmarker(self):
            raise RuntimeError("Nothing can be timed without a GPU.")

        def get_current_device(self):
            return architecture  # the key of what is compiled for this device

        def get_current_stream(self, device):
            return 0

    return StandIn()


@contextmanager
def stand_in_device(architecture: str) -> Iterator[None]:
    """What launchers may ask of the GPU, answered for one that is not there."""
    machine = MACHINES[architecture]
    major, minor = divmod(machine.capability, 10)
    properties = SimpleNamespace(
        multi_processor_count=machine.multiprocessors, major=major, minor=minor
    )
    answers = {
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (major, minor),
        "current_device": lambda: 0,
        "current_stream": lambda device=None: SimpleNamespace(cuda_stream=0),
    }
    with mock.patch.multiple(torch.cuda, **answers):
        yield


def find_nvcc() -> str | None:
    """The CUDA compiler, where there is one."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    return shutil.which("nvcc") or (str(home) if home.exists() else None)


def compile_cuda(nvcc: str, source: Path, architecture: str) -> bytes:
    """The machine code of a .cu file.

    Raises:
        RuntimeError: with the compiler's own words, when it fails.
    """
    code = f"arch=compute_{architecture[3:]},code={architecture}"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [nvcc, "-std=c++17", "-O3", "-gencode", code, "-cubin"]
        done = subprocess.run(
            [*command, "-o", str(cubin), str(source)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"nvcc failed on {source.name}:\n{done.stderr[-2000:]}")
        return cubin.read_bytes()
