"""What a call of ops does on a device, so that it can be done again without Python.

    norms, launches = recorded(lambda g, a: [sequence_sq_norms(a, g, False)[0]], [g, a])

Kernels are launched by `launch`, or by the launchers of the extension, `watched`; both
note it here: the function that the driver knows, the grid, and for every address where
it points: so many bytes after the beginning of an input, of the scratch or of an
output. All else that happens on the device must be an allocation. What PyTorch computes
cannot be launched again, and no launches are returned then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ._launches import (
    KernelLaunch,
    LauncherCall,
    NotRecordableError,
    Recorded,
    described,
)
from ._pieces import LIMIT

__all__ = ["Recorded", "launch", "recorded", "watched"]

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}


class _Recorder(TorchDispatchMode):
    """Notes allocations and launches of a thread; see the module."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.allocated: list[Tensor] = []
        self.launches: list[KernelLaunch | LauncherCall] = []
        self.is_complete = True
        self._bytes, self._most = 0, most

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self._keep(out)
        elif not (func.is_view or _is_of_host(args, out)):
            self._give_up()
        return out

    def note(self, launched: KernelLaunch | LauncherCall) -> None:
        """Hold a launch, with the tensors that it is given."""
        if self.is_complete:
            self.launches.append(launched)

    def _keep(self, allocated: Tensor) -> None:
        """Hold memory, so that nothing else is given the same; not without limit.

        All of it but outputs is scratch, which lives as long as a backward pass.
        """
        self._bytes += allocated.untyped_storage().nbytes()
        if self._bytes > self._most:
            self._give_up()
        if self.is_complete:
            self.allocated.append(allocated)

    def _give_up(self) -> None:
        """Hold nothing, as what is called would not."""
        self.is_complete = False
        self.allocated.clear()
        self.launches.clear()


def _is_of_host(args: Sequence[Any], out: Any) -> bool:
    """Whether an operation has to do with no tensor, as one on dtypes."""
    return not any(isinstance(x, Tensor) for x in tree_leaves((args, out)))


_THREAD = threading.local()


class _Watched:
    """The launchers of the extension, whose calls are noted."""

    def __init__(self, kernels: Any, recorder: _Recorder) -> None:
        self._kernels, self._recorder = kernels, recorder

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._kernels, name)
        address, letters = getattr(self._kernels, "callers", {}).get(name, (0, "v"))
        if not letters.endswith("v"):
            return function  # it computes a size, and launches nothing

        def call(*args: Any) -> None:
            function(*args)
            self._recorder.note(LauncherCall(address, letters[:-1], args))

        return call


def watched(kernels: Any) -> Any:
    """The launchers of the extension; in a recording, ones that note their calls."""
    recorder = getattr(_THREAD, "recorder", None)
    return kernels if recorder is None else _Watched(kernels, recorder)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a Triton kernel; a recording notes it.

    Args:
        kernel: a function under `triton.jit`.
        grid: how many programs, in each of up to three dimensions.
        args: its first arguments, tensors and numbers.
        options: its other arguments by name, and Triton's own such as `num_warps`.
    """
    compiled = kernel[grid](*args, **options)
    recorder = getattr(_THREAD, "recorder", None)
    if recorder is not None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | options
        recorder.note(KernelLaunch(compiled, grid, given))


def recorded(
    run: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor],
    wanted: Sequence[bool],
    of_outputs: int = 0,
) -> tuple[Sequence[Tensor | None], Recorded | None]:
    """Run `run(*inputs)`, and say how to launch it again.

    Args:
        run: computes outputs from the inputs by ops.
        inputs: on one device.
        wanted: of each output, whether it is asked for.
        of_outputs: bytes of what outputs take, if that is much.

    Returns:
        The outputs, and what was launched for them: None where something else was
        computed, an output is not float32 in memory of its own, or more than
        `LIMIT` bytes were allocated beside `of_outputs`.
    """
    recorder = _Recorder(LIMIT + of_outputs)
    _THREAD.recorder = recorder
    try:
        with recorder:
            outputs = run(*inputs)
    finally:
        _THREAD.recorder = None
    if not recorder.is_complete or not recorder.launches:
        return outputs, None
    asked = [x for x, is_wanted in zip(outputs, wanted, strict=True) if is_wanted]
    try:
        found = described(recorder.launches, recorder.allocated, inputs, asked)
        return outputs, found
    except NotRecordableError:
        return outputs, None
