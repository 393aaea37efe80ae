"""Builds the optional native extension; everything else is in pyproject.toml.

Each kernel file is compiled once per instruction set and the best one is chosen at
run time, so a wheel runs on any machine of its architecture. Torch headers are not
needed. OpenMP symbols are left unresolved on purpose: `import torch` provides them,
so the kernels run on PyTorch's own threads.
"""

import os
import platform
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError, ExecError, PlatformError

ROOT = Path(__file__).parent
KERNELS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp"))
BASE_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-fopenmp"]
BASE_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
IS_X86 = platform.machine().lower() in {"x86_64", "amd64"}
# Compiled with these flags; the first entry is the baseline and holds the bindings.
INSTRUCTION_SETS = {"generic": ["-DFM_BASELINE"]}
if IS_X86:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"),
        "-mprefer-vector-width=512",
    ]


class BuildNative(build_ext):
    """Compiles every kernel file once per instruction set; never fails the install."""

    def build_extension(self, ext):
        if os.environ.get("FASTMINIMA_NATIVE", "1") == "0":
            return self._skip("FASTMINIMA_NATIVE=0")
        try:
            self._build(ext)
        except (CCompilerError, CompileError, ExecError, PlatformError, OSError) as error:
            if os.environ.get("FASTMINIMA_NATIVE") == "1":
                raise
            self._skip(f"{type(error).__name__}: {error}")

    def _build(self, ext):
        if sys.platform == "win32":
            raise PlatformError("the native kernels need gcc or clang")
        objects = []
        for name, flags in INSTRUCTION_SETS.items():
            sources = [*KERNELS] if name != "generic" else [*KERNELS, "csrc/module.cpp"]
            objects += self.compiler.compile(
                sources,
                output_dir=str(Path(self.build_temp) / name),
                include_dirs=["csrc", pybind11.get_include(), *self.include_dirs],
                extra_postargs=[*BASE_FLAGS, f"-DFM_ISA={name}", *flags],
                depends=[str(p) for p in ROOT.glob("csrc/**/*.h")],
            )
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, target, target_lang="c++", build_temp=self.build_temp
        )

    def _skip(self, reason):
        self.warn(f"fastminima: native kernels not built ({reason})")
        self.warn("fastminima: the PyTorch reference implementations will be used")


setup(
    ext_modules=[Extension("fastminima._native_ext", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
