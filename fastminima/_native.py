"""The native extension, when it was built: its kernels for the best instruction set."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch  # first: its OpenMP runtime is the one the extension runs on

__all__ = ["available_isas", "kernels", "kernels_for", "missing_reason", "threads"]

_NAME = "fastminima._native_ext"


def _load() -> tuple[ModuleType | None, str | None]:
    if importlib.util.find_spec(_NAME) is None:
        return None, "the extension was not built: no C++ compiler at install time"
    return importlib.import_module(_NAME), None


_extension, missing_reason = _load()


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


kernels: ModuleType | None = (
    None if _extension is None else kernels_for(available_isas()[0])
)


def threads() -> int:
    """Threads a kernel may use: what PyTorch itself would use at this moment."""
    return torch.get_num_threads()


def parallel_threads(requested: int) -> int:
    """Threads that a native parallel region of `requested` really gets."""
    if _extension is None:
        raise LookupError(f"No native kernels here: {missing_reason}.")
    return _extension.parallel_threads(requested)
