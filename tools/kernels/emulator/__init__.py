"""Builds the CUDA kernels for the emulated device, callable as in the extension."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = sorted((HERE.parents[2] / "csrc" / "cuda").glob("*.cu"))
BASE = ["-std=c++17", "-O1", "-g0", "-w", f"-I{HERE}", "-x", "c++"]
ADDRESS = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREAD = ["-O0", "-fsanitize=thread"]
COMPILER = os.environ.get("CXX", "g++")
# cuda_machine.h tells the sanitizers about its fibers where they name themselves so.
_NAMED = """#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#error "no sanitizer of gcc"
#endif
"""
_TYPES = {"p": ctypes.c_void_p, "d": ctypes.c_double, "i": ctypes.c_int64}


def missing(flags, folder):
    """Why programs with `flags` cannot be built and run here, or None."""
    if shutil.which(COMPILER) is None:
        return f"no {COMPILER}"
    source = folder / "empty.cpp"
    check = _NAMED if any("sanitize" in flag for flag in flags) else ""
    source.write_text(check + "int main() { return 0; }\n")
    try:
        run(build(folder / "empty", [source], flags))
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout or str(error)).strip().splitlines()
        return f"{' '.join(flags)}: {lines[0] if lines else error}"
    return None


def build(target, sources, flags):
    command = [COMPILER, *BASE, *flags, *map(str, sources), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def run(program, *arguments, check=True):
    """Runs a program; without random addresses, which ThreadSanitizer may dislike."""
    quiet = [tool, "-R"] if (tool := shutil.which("setarch")) else []
    return subprocess.run(
        [*quiet, str(program), *arguments],
        check=check,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
    )


class Emulated:
    """The launchers as attributes, like those of `fastminima._native_ext.cuda`."""

    def __init__(self, path):
        self._library = library = ctypes.CDLL(str(path))
        for name in ("entry_name", "entry_signature", "last_message"):
            getattr(library, name).restype = ctypes.c_char_p
        for name in ("entry_address", "entry_by_words"):
            getattr(library, name).restype = ctypes.c_void_p
        library.half_bits.argtypes = [ctypes.c_float]
        library.half_bits.restype = ctypes.c_uint16
        self.callers = {}
        i = 0
        while (name := library.entry_name(i)) is not None:
            setattr(self, name.decode(), self._function(i))
            letters = library.entry_signature(i).decode()
            self.callers[name.decode()] = library.entry_by_words(i), letters
            i += 1

    def _function(self, i):
        *arguments, result = self._library.entry_signature(i).decode()
        types = [_TYPES[letter] for letter in arguments]
        out = ctypes.POINTER(ctypes.c_int64)
        address = self._library.entry_address(i)
        call = ctypes.CFUNCTYPE(ctypes.c_int, *types, out)(address)

        def function(*values):
            value = ctypes.c_int64()
            if len(values) != len(types):
                raise TypeError(f"{len(values)} arguments for {len(types)}")
            if call(*values, ctypes.byref(value)):
                raise RuntimeError(self._library.last_message().decode())
            return value.value if result == "i" else None

        return function

    def set_schedule(self, name, seed=1):
        """The order of threads and blocks: "forward", "reverse" or "random"."""
        self._name = name.encode()  # the library keeps a copy
        self._library.set_schedule(self._name, seed)

    def half_bits(self, value):
        return self._library.half_bits(value)
