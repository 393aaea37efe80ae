"""Compiles what host code launches, on a machine without a GPU.

Launchers run on `meta` tensors of real shape under a stand-in for the driver: each
launch in them is compiled with the specialisation that a real one would get, and noted
instead of being run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tools.kernels.occupancy import MACHINES

__all__ = ["Compiled", "compile_cuda", "compiling", "find_nvcc", "stand_in_device"]


@dataclass(frozen=True)
class Compiled:
    """One kernel as machine code, with how it is launched."""

    name: str
    symbol: str
    blocks: int | None  # of the grid; None where only the launch would tell
    warps: int
    dynamic_shared: int
    cubin: bytes
    ptx: str

    @property
    def digest(self) -> str:
        """Of the instructions in PTX: the same for the same code in another place.

        Comments, line numbers, names of files and debug sections are left out.
        """
        code = self.ptx.partition(".section")[0]
        lines = (line.partition("//")[0].strip() for line in code.splitlines())
        kept = [x for x in lines if x and not x.startswith((".loc", ".file"))]
        return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:16]


@contextmanager
def compiling(architecture: str) -> Iterator[list[Compiled]]:
    """Compile each Triton launch for an architecture and add it to the list."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if hasattr(kernel, "result"):
            kernel = kernel.result()
        if callable(grid):
            names = [parameter.name for parameter in self.params]
            grid = grid(dict(zip(names, args, strict=False)) | options)
        found.append(_compiled(self.__name__, kernel, grid))
        return kernel

    before = driver._active
    driver.set_active(_stand_in(architecture))
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            stand_in_device(architecture),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield found
    finally:
        driver._active = before


def _compiled(name: str, kernel: Any, grid: Sequence[int]) -> Compiled:
    meta = kernel.metadata
    return Compiled(
        name,
        meta.name,
        prod(grid),
        meta.num_warps,
        meta.shared,
        kernel.asm["cubin"],
        kernel.asm["ptx"],
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
