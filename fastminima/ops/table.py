"""An operation with one meaning and several implementations."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from .preferences import is_preferred
from .recording import watched

__all__ = ["REGISTRY", "Implementation", "Op"]

REGISTRY: dict[str, Op] = {}


class Implementation(NamedTuple):
    """One way to compute an op, and where it can be used."""

    backend: str
    run: Callable[..., Any]
    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    is_preferred: bool


def _leader(first: Tensor | Sequence[Tensor]) -> Tensor:
    """The tensor that decides: the argument itself, or the first of a list."""
    return first if isinstance(first, Tensor) else first[0]


def _in_memory(x: Any) -> Any:
    """An argument whose memory holds its values, for kernels that read that alone.

    PyTorch has views that are negated when they are read, and zeros without memory.

    Raises:
        RuntimeError: where memory was taken away, as PyTorch's own kernels say.
    """
    if isinstance(x, Tensor):
        return x if x.data_ptr() and not x.is_neg() else _written_down(x)
    if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor):
        return [_in_memory(each) for each in x]
    return x


def _written_down(x: Tensor) -> Tensor:
    if x.numel() and not (x.data_ptr() or x._is_zerotensor()):
        raise RuntimeError(
            f"A tensor of shape {tuple(x.shape)} has no memory: its storage was "
            "resized to nothing. Fill it again before a backward pass reads it."
        )
    return x.clone()


class Op:
    """A statistic of one layer, and every way this machine can compute it.

    The reference is plain PyTorch, runs on any device and dtype, and defines the
    meaning: each other implementation is tested against it in float64. What is missing
    on a machine is absent from the table.

    Example:
        >>> import torch
        >>> from fastminima.ops.table import Op
        >>> total = Op("doctest_total", lambda x: x.sum())
        >>> total(torch.ones(3))
        tensor(3.)
        >>> total.backends("cpu", torch.float32)
        ('reference',)
    """

    def __init__(
        self, name: str, reference: Callable[..., Any], *, is_in_place: bool = False
    ) -> None:
        self.name = name
        self.reference = reference
        self._is_in_place = is_in_place  # it writes into the tensors that it is given
        self._implementations: list[Implementation] = []
        self._chosen: dict[tuple[str, torch.dtype], Callable[..., Any]] = {}
        self.__doc__ = reference.__doc__
        REGISTRY[name] = self

    def add(
        self,
        backend: str,
        run: Callable[..., Any],
        *,
        devices: Iterable[str],
        dtypes: Iterable[torch.dtype],
        preferred: bool = True,
    ) -> None:
        """Add an implementation; the last one added with `preferred` is used.

        Of two with the same name for a device and dtype, the last one is there.
        """
        self._implementations.append(
            Implementation(
                backend, run, frozenset(devices), frozenset(dtypes), preferred
            )
        )
        self._chosen.clear()

    def add_native(
        self,
        run: Callable[..., Any],
        *,
        preferred: bool = True,
        dtypes: Iterable[torch.dtype] = (torch.float32, torch.float64),
    ) -> None:
        """Add `run(kernels, *args)` for each instruction set of the extension.

        The best one is "native"; the others are "native-<isa>", there to be tested.
        """
        for rank, isa in enumerate(_native.available_isas()):
            module = _native.kernels_for(isa)

            def call(*args: Any, _module: Any = module, **kwargs: Any) -> Any:
                return run(_module, *args, **kwargs)

            self.add(
                "native" if rank == 0 else f"native-{isa}",
                call,
                devices=("cpu",),
                dtypes=dtypes,
                preferred=preferred and rank == 0,
            )

    def add_triton(
        self,
        launcher: str,
        *,
        dtypes: Iterable[torch.dtype],
        preferred: bool | None = None,
        backend: str = "triton",
    ) -> None:
        """Add the launcher named "module.function" of `fastminima.ops.triton`.

        Triton is imported when the launcher first runs. It launches on the device that
        is current, so the first tensor's is made that. Where Triton is not installed
        nothing is added. `preferred` is as `preferences.py` says, for each dtype, if it
        is not given. The `backend` "torch" is for a launcher whose products are
        PyTorch's own, and takes the place of a way without Triton.
        """
        if preferred is None:
            for dtype in dtypes:
                chosen = is_preferred(self.name, "triton", dtype)
                self.add_triton(launcher, dtypes=(dtype,), preferred=chosen)
            return
        if importlib.util.find_spec("triton") is None:
            return
        module, name = launcher.split(".")

        def call(first: Tensor | Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
            found = importlib.import_module(f".triton.{module}", __package__)
            with torch.cuda.device_of(_leader(first)):
                return getattr(found, name)(first, *args, **kwargs)

        self.add(backend, call, devices=("cuda",), dtypes=dtypes, preferred=preferred)

    def add_cuda(
        self,
        run: Callable[..., Any],
        *,
        dtypes: Iterable[torch.dtype],
        preferred: bool | None = None,
    ) -> None:
        """Add `run(kernels, *args)`, where the extension was built with CUDA.

        It runs with the device of the first tensor current, as a launch needs it.
        `preferred` is as in `add_triton`.
        """
        if preferred is None:
            for dtype in dtypes:
                chosen = is_preferred(self.name, "cuda", dtype)
                self.add_cuda(run, dtypes=(dtype,), preferred=chosen)
            return
        kernels = _native.cuda_kernels()
        if kernels is None:
            return

        def call(first: Tensor | Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
            with torch.cuda.device_of(_leader(first)):
                return run(watched(kernels), first, *args, **kwargs)

        self.add("cuda", call, devices=("cuda",), dtypes=dtypes, preferred=preferred)

    def __iter__(self) -> Iterator[Implementation]:
        return iter(self._implementations)

    def backends(self, device: str, dtype: torch.dtype) -> tuple[str, ...]:
        """Names of the implementations for a device and dtype, the used one first."""
        fit = [
            i
            for i in self._implementations
            if device in i.devices and dtype in i.dtypes
        ]
        fast = [i.backend for i in reversed(fit) if i.is_preferred]
        slow = [i.backend for i in reversed(fit) if not i.is_preferred]
        return tuple(dict.fromkeys((*fast, "reference", *slow)))

    def on(self, backend: str, device: str, dtype: torch.dtype) -> Callable[..., Any]:
        """The implementation named `backend` for a device and dtype."""
        if backend == "reference":
            return self.reference
        for i in reversed(self._implementations):
            if i.backend == backend and device in i.devices and dtype in i.dtypes:
                return i.run
        raise LookupError(
            f"{self.name} has no {backend!r} implementation for {dtype} on "
            f"{device!r}; it has {self.backends(device, dtype)}."
        )

    def __call__(
        self, first: Tensor | Sequence[Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        leader = _leader(first)
        key = (leader.device.type, leader.dtype)
        run = self._chosen.get(key)
        if run is None:
            run = self._chosen[key] = self.on(self.backends(*key)[0], *key)
        if run is self.reference or self._is_in_place:
            return run(first, *args, **kwargs)
        if kwargs:
            kwargs = {name: _in_memory(x) for name, x in kwargs.items()}
        return run(*map(_in_memory, (first, *args)), **kwargs)
