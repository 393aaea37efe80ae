"""Finds a CUDA compiler for setup.py and compiles the kernels with it.

FASTMINIMA_CUDA=0 leaves the CUDA kernels out; FASTMINIMA_CUDA=1 makes their absence an
error. FASTMINIMA_CUDA_ARCHS names the architectures, as in "80;90a;100+PTX"; NVCC or
CUDA_HOME the compiler. The runtime is linked statically, so that the module can be
imported without a driver.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

MODE = os.environ.get("FASTMINIMA_CUDA")
OLDEST = (12, 1)
LIBRARIES = ["cudart_static", "rt", "pthread", "dl"]
FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
FLAGS += ["-Xfatbin", "-compress-all"]
TRIAL = """#include <cuda_runtime.h>
__global__ void set(float* p) { *p = 1; }
int launch(float* p) { set<<<1, 1>>>(p); return cudaGetLastError(); }
"""


class CudaMissing(Exception):
    """There is no usable CUDA compiler here; the message says why."""


class Toolkit:
    """An nvcc that has been tried, and what to compile for."""

    def __init__(self):
        self.nvcc = _find_nvcc()
        version = _version(self.nvcc)
        if version < OLDEST:
            raise CudaMissing(
                f"{self.nvcc} is version {_dotted(version)}, older than "
                f"{_dotted(OLDEST)}"
            )
        default = "80;90a;100+PTX" if version >= (12, 8) else "80;90a;90+PTX"
        names = os.environ.get("FASTMINIMA_CUDA_ARCHS", default).split(";")
        self.flags, found = [*FLAGS], []
        for name in filter(None, names):
            number = name.removesuffix("+PTX")
            kinds = ["sm", "compute"] if name.endswith("+PTX") else ["sm"]
            found += [f"{kind}_{number}" for kind in kinds]
            self.flags += [
                f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds
            ]
        self.architectures = ";".join(dict.fromkeys(found))
        self.library_dirs = _library_dirs(self.nvcc)
        self._try()

    def compile(self, source, target):
        """Compile one file."""
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        _run([self.nvcc, *self.flags, "-c", source, "-o", target])
        return target

    def _try(self):
        """Compile and link something small.

        A host compiler that nvcc refuses, an architecture that it does not know and a
        missing header or library all show here.
        """
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "trial.cu"), Path(folder, "trial.so")
            source.write_text(TRIAL)
            link = ["-shared", "-cudart=static"]
            link += [f"-L{path}" for path in self.library_dirs]
            _run([self.nvcc, *self.flags, *link, str(source), "-o", str(target)])


def find():
    """A usable toolkit, or None and the reason.

    Raises:
        RuntimeError: if FASTMINIMA_CUDA=1 and there is none.
    """
    try:
        if MODE == "0":
            raise CudaMissing("FASTMINIMA_CUDA=0 at install time")
        return Toolkit(), None
    except (CudaMissing, OSError) as error:
        return None, refuse(error)


def refuse(error):
    """`error` as a reason in one line; an error itself if CUDA has to be there."""
    reason = " ".join(str(error).split())
    if MODE == "1":
        raise RuntimeError(f"FASTMINIMA_CUDA=1, but {reason}") from None
    return reason


def _find_nvcc():
    homes = (os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    places = [os.environ.get("NVCC")]
    places += [f"{home}/bin/nvcc" for home in homes if home]
    places += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    # The package nvidia-cuda-nvcc, if it is among the build requirements.
    places += [f"{path}/nvidia/cu13/bin/nvcc" for path in sys.path]
    for place in places:
        if place and os.access(place, os.X_OK):
            return place
    raise CudaMissing("no nvcc")


def _version(nvcc):
    found = re.search(r"release (\d+)\.(\d+)", _run([nvcc, "--version"]))
    if found is None:
        raise CudaMissing(f"{nvcc} does not say its version")
    return tuple(int(part) for part in found.groups())


def _dotted(version):
    return ".".join(map(str, version))


def _library_dirs(nvcc):
    """Where the runtime library is, by nvcc's own account: it may be a wrapper."""
    said = _run([nvcc, "-dryrun", "-x", "cu", os.devnull, "-o", os.devnull])
    paths = {"INCLUDES": [], "LIBRARIES": []}
    for name, flag in (("INCLUDES", "-I"), ("LIBRARIES", "-L")):
        for line in said.splitlines():
            if re.search(rf"\b{name}=", line):
                paths[name] += re.findall(rf'{flag}([^"\s]+)', line)
    # The package nvidia-cuda-nvcc has its libraries beside its headers.
    places = paths["LIBRARIES"] + [f"{path}/../lib" for path in paths["INCLUDES"]]
    return [os.path.normpath(path) for path in places if Path(path).is_dir()]


def _run(command):
    """What a command prints.

    Raises:
        CudaMissing: if it fails.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines()
        telling = [line for line in lines if "error" in line.lower()] or lines[-1:]
        raise CudaMissing(f"{Path(command[0]).name} failed: {' '.join(telling[:2])}")
    return done.stdout + done.stderr
