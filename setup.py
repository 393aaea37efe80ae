"""Builds the optional native extension; everything else is in pyproject.toml.

Each kernel file is compiled once per instruction set and the best one is chosen at
run time, so a wheel runs on any machine of its architecture. Torch headers are not
needed. OpenMP symbols are left unresolved on purpose: `import torch` provides them,
so the kernels run on PyTorch's own threads.

FASTMINIMA_NATIVE=0 leaves the extension out; FASTMINIMA_NATIVE=1 makes a failed build
an error. Otherwise a failed build is reported, and its reason kept for
`python -m fastminima`.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError, ExecError, PlatformError

ROOT = Path(__file__).parent
KERNELS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp"))
BASE_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-fopenmp"]
BASE_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
BASE_FLAGS += ["-g0"]  # Python's own flags may ask for -g, which keeps build paths
IS_X86 = platform.machine().lower() in {"x86_64", "amd64"}
# Compiled with these flags; the first entry is the baseline and holds the bindings.
INSTRUCTION_SETS = {"generic": ["-DFM_BASELINE"]}
if IS_X86:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"),
        "-mprefer-vector-width=512",
    ]
MODE = os.environ.get("FASTMINIMA_NATIVE")
NOTE = "_native_missing.txt"  # beside the package: why there is no extension
BUILD_ERRORS = (CCompilerError, CompileError, ExecError, PlatformError, OSError)


class BuildNative(build_ext):
    """Compiles every kernel file once per instruction set; never fails the install."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(target, target.with_name(NOTE))  # of an earlier build in this folder
        if MODE == "0":
            return self._skip(target, "FASTMINIMA_NATIVE=0 at install time")
        try:
            self._build(target)
        except BUILD_ERRORS as error:
            if MODE == "1":
                raise
            reason = f"{type(error).__name__}: {error}"
            self._skip(target, " ".join(reason.split()))

    def copy_extensions_to_source(self):
        """For editable installs: the module or, if there is none, the note why."""
        for ext in self.extensions:
            built = Path(self.build_lib, *ext.name.split("."))
            source = Path(self.get_ext_fullpath(ext.name))
            _remove(source, source.with_name(NOTE))
            if built.with_name(NOTE).exists():
                self.copy_file(str(built.with_name(NOTE)), str(source.with_name(NOTE)))
        super().copy_extensions_to_source()

    def _build(self, target):
        if sys.platform == "win32":
            raise PlatformError("the native kernels need gcc or clang")
        jobs = [(name, source) for name in INSTRUCTION_SETS for source in KERNELS]
        jobs.append(("generic", "csrc/module.cpp"))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [o for found in pool.map(self._compile, jobs) for o in found]
        self.compiler.link_shared_object(
            objects, str(target), target_lang="c++", build_temp=self.build_temp
        )

    def _compile(self, job):
        name, source = job
        flags = [*BASE_FLAGS, f"-DFM_ISA={name}", *INSTRUCTION_SETS[name]]
        return self.compiler.compile(
            [source],
            output_dir=str(Path(self.build_temp) / name),
            include_dirs=["csrc", pybind11.get_include(), *self.include_dirs],
            extra_postargs=flags,
        )

    def _skip(self, target, reason):
        target.with_name(NOTE).write_text(reason + "\n")
        self.warn(f"fastminima: native kernels not built ({reason})")
        self.warn("fastminima: the PyTorch reference implementations will be used")


def _remove(*paths):
    for path in paths:
        path.unlink(missing_ok=True)


setup(
    ext_modules=[Extension("fastminima._native_ext", sources=[], optional=MODE != "1")],
    cmdclass={"build_ext": BuildNative},
)
