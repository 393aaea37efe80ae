"""The native extension, when it was built: its kernels for the best instruction set."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # first: its OpenMP runtime is the one the extension runs on

__all__ = [
    "available_isas",
    "best_isa",
    "cuda_architectures",
    "cuda_kernels",
    "cuda_missing_reason",
    "host",
    "kernels",
    "kernels_for",
    "missing_reason",
    "parallel_threads",
    "threads",
]

_NAME = "fastminima._native_ext"


def _load() -> tuple[Any, str | None]:
    """The extension, or None and why it is not there."""
    if os.environ.get("FASTMINIMA_NATIVE") == "0":
        return None, "switched off by FASTMINIMA_NATIVE=0"
    if importlib.util.find_spec(_NAME) is None:
        return None, f"not built: {_build_failure()}"
    try:
        return importlib.import_module(_NAME), None
    except ImportError as error:
        if not _is_openmp_missing(error):
            raise
    try:
        _share_openmp()
        return importlib.import_module(_NAME), None
    except ImportError as error:
        return None, f"this PyTorch exports no OpenMP runtime ({error})"


def _share_openmp() -> None:
    """Let the extension see the OpenMP runtime that PyTorch has loaded for itself.

    As on Linux on ARM, where it is not among the libraries that `import torch` loads
    for all. Nothing is loaded that is not there already.
    """
    if not hasattr(os, "RTLD_NOLOAD"):  # Windows
        return
    for name in ("libgomp.so.1", "libomp.so.5", "libomp.so", "libiomp5.so"):
        with contextlib.suppress(OSError):
            ctypes.CDLL(name, mode=os.RTLD_NOW | os.RTLD_GLOBAL | os.RTLD_NOLOAD)


def _build_failure(name: str = "_native_missing.txt") -> str:
    """What setup.py wrote down when it could not build the extension, or a part."""
    note = Path(__file__).with_name(name)
    return note.read_text().strip() if note.exists() else "never compiled here"


def _is_openmp_missing(error: ImportError) -> bool:
    """Whether the extension was refused for want of OpenMP's symbols.

    They are left to the runtime that `import torch` loads with global symbols; a
    PyTorch built without OpenMP, or one that hides it, has none to offer.
    """
    symbols = ("GOMP_", "omp_", "__kmpc_")
    return any(f"symbol: {symbol}" in str(error) for symbol in symbols)


def _announce(reason: str | None) -> None:
    if reason is not None and "FASTMINIMA_NATIVE=0" not in reason:
        warnings.warn(
            f"fastminima runs without its native kernels, slower but equally exact "
            f"({reason}). Install a C++ compiler and reinstall, or set "
            "FASTMINIMA_NATIVE=0 to accept it.",
            stacklevel=2,
        )


_extension, missing_reason = _load()
_announce(missing_reason)


def available_isas() -> tuple[str, ...]:
    """Instruction sets that this build and this processor have, the best first."""
    return () if _extension is None else tuple(_extension.supported())


def kernels_for(isa: str) -> ModuleType:
    """The kernels compiled for `isa`, one of `available_isas()`."""
    if isa not in available_isas():
        raise LookupError(
            f"No native kernels for {isa!r} here; there are {available_isas()}."
        )
    return getattr(_extension, isa)


best_isa: str | None = None if _extension is None else available_isas()[0]
kernels: ModuleType | None = None if best_isa is None else kernels_for(best_isa)


def host() -> Any:
    """What walks graphs and runs hooks in C++; None where there is no extension."""
    return getattr(_extension, "host", None)


def cuda_kernels() -> ModuleType | None:
    """The launchers of the CUDA kernels, if the extension was built with them."""
    return getattr(_extension, "cuda", None)


def cuda_missing_reason() -> str | None:
    """Why there are no CUDA kernels, or None."""
    if cuda_kernels() is not None:
        return None
    return missing_reason or f"not built: {_build_failure('_cuda_missing.txt')}"


def cuda_architectures() -> tuple[str, ...]:
    """What the CUDA kernels were compiled for, such as "sm_90a"; PTX last."""
    found = getattr(cuda_kernels(), "architectures", "")
    return tuple(name for name in found.split(";") if name)


def threads() -> int:
    """Threads a kernel may use: what PyTorch itself would use at this moment."""
    return torch.get_num_threads()


def parallel_threads(requested: int) -> int:
    """Threads that a native parallel region of `requested` really gets."""
    if _extension is None:
        raise LookupError(f"No native kernels here: {missing_reason}.")
    return _extension.parallel_threads(requested)
