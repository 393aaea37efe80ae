"""Builds the optional native extension; everything else is in pyproject.toml.

Each kernel file is compiled once per instruction set and the best one is chosen at
run time, so a wheel runs on any machine of its architecture. Torch headers are not
needed. OpenMP symbols are left unresolved on purpose: `import torch` provides them,
so the kernels run on PyTorch's own threads.

FASTMINIMA_NATIVE=0 leaves the extension out; FASTMINIMA_NATIVE=1 makes a failed build
an error. Otherwise a failed build is reported, and its reason kept for
`python -m fastminima`. Where nvcc works, the CUDA kernels go into the same extension:
see build_cuda.py.
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
sys.path.insert(0, str(ROOT))  # the build frontend may have left it out
import build_cuda  # noqa: E402

KERNELS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp"))
HOST = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/host/*.cpp"))
CUDA_KERNELS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/*.cu"))
# Apple's clang knows OpenMP, but not by this name.
OPENMP = ["-Xclang", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]
BASE_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", *OPENMP]
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
CUDA_NOTE = "_cuda_missing.txt"  # or why there are no CUDA kernels in it
BUILD_ERRORS = (CCompilerError, CompileError, ExecError, PlatformError, OSError)


class BuildNative(build_ext):
    """Compiles every kernel file once per instruction set; never fails the install."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Of an earlier build in this folder:
        _remove(target, target.with_name(NOTE), target.with_name(CUDA_NOTE))
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
            _remove(source)
            for name in (NOTE, CUDA_NOTE):
                _remove(source.with_name(name))
                note = built.with_name(name)
                if note.exists():
                    self.copy_file(str(note), str(source.with_name(name)))
        super().copy_extensions_to_source()

    def _build(self, target):
        if sys.platform == "win32":
            raise PlatformError("the native kernels need gcc or clang")
        toolkit, reason = build_cuda.find()
        jobs = [(name, source) for name in INSTRUCTION_SETS for source in KERNELS]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = pool.map(self._compile, jobs)
            objects = next(compiled)  # fails at once where there is no compiler
            cuda = pool.submit(self._compile_cuda, toolkit) if toolkit else None
            try:
                objects += [o for found in compiled for o in found]
                if cuda is not None:
                    objects += cuda.result()
            except build_cuda.CudaMissing as error:
                toolkit, reason = None, build_cuda.refuse(error)
        objects += self._compile_bindings(toolkit)
        self._link(objects, target, toolkit)
        if toolkit is None:
            target.with_name(CUDA_NOTE).write_text(reason + "\n")
            self.warn(f"fastminima: CUDA kernels not built ({reason})")

    def _compile(self, job, defines=()):
        name, source = job
        flags = [*BASE_FLAGS, f"-DFM_ISA={name}", *INSTRUCTION_SETS[name], *defines]
        return self.compiler.compile(
            [source],
            output_dir=str(Path(self.build_temp) / name),
            include_dirs=["csrc", pybind11.get_include(), *self.include_dirs],
            extra_postargs=flags,
        )

    def _compile_cuda(self, toolkit):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            folder = Path(self.build_temp) / "cuda"
            targets = [str(folder / f"{Path(s).stem}.cu.o") for s in CUDA_KERNELS]
            return list(pool.map(toolkit.compile, CUDA_KERNELS, targets))

    def _compile_bindings(self, toolkit):
        sources, defines = ["csrc/module.cpp", *HOST], []
        if toolkit is not None:
            sources.append("csrc/cuda/bind.cpp")
            names = toolkit.architectures
            defines = ["-DFM_WITH_CUDA", f'-DFM_CUDA_ARCHITECTURES="{names}"']
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [(("generic", source), defines) for source in sources]
            done = list(pool.map(lambda job: self._compile(*job), jobs))
        return [o for found in done for o in found]

    def _link(self, objects, target, toolkit):
        more = {}
        if toolkit is not None:
            more = {
                "libraries": build_cuda.LIBRARIES,
                "library_dirs": toolkit.library_dirs,
                "extra_postargs": ["-Wl,--exclude-libs,ALL"],
            }
        self.compiler.link_shared_object(
            objects, str(target), target_lang="c++", build_temp=self.build_temp, **more
        )

    def _skip(self, target, reason):
        if build_cuda.MODE == "1":
            build_cuda.refuse(reason)
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
