"""A GPU's driver on the CPU: kernels are interpreted, launches counted.

Triton kernels that are launched by Python run in the interpreter of `tools.kernels` and
give back what a compiled kernel would say of itself. The extension launches through
`cuLaunchKernel`: here a function of Python, which finds the kernel by its number, reads
the arguments from where the driver would, and interprets it on the memory that they
point to.
"""

import contextlib
import ctypes
import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.jit import JITFunction

from fastminima.capture.graph.extension import learned
from fastminima.capture.session import called, making
from fastminima.ops.table import Op, _in_memory
from tools.kernels.capturable import cuda_ops
from tools.kernels.interpreter import interpreting

__all__ = ["FakeDriver", "driving"]

_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    *[ctypes.c_uint] * 7,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)
_CAPTURING = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)
)
_TYPES = {
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "fp32": ctypes.c_float,
    "fp64": ctypes.c_double,
}
_KINDS = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
}


@dataclass
class _Function:
    """A kernel as it was compiled: for arguments of these kinds."""

    run: object
    kinds: dict
    given: dict
    dtypes: dict
    spans: dict
    options: dict
    threads: int
    shared: int


class FakeDriver:
    """What the extension launches, and with what it is answered.

    Attributes:
        launches: names of kernels that the extension launched.
        by_python: names of those that Python launched.
        code: the CUresult of the next launches.
        is_idle: count launches, and compute nothing.
        is_capturing: what is said of each stream.
    """

    def __init__(self):
        self.launches, self.by_python = [], []
        self.code, self.is_idle, self.is_capturing = 0, False, False
        self.wrong = 0.0  # added to what kernels store in their last tensor
        self._functions = {}
        self._numbers = itertools.count(4096)
        self._callbacks = _LAUNCH(self._launch), _CAPTURING(self._tell_capturing)

    @property
    def addresses(self):
        return [ctypes.cast(f, ctypes.c_void_p).value for f in self._callbacks]

    def compiled(self, kernel, run, args, options):
        """What Triton returns of a launch: the kernel for such arguments."""
        names = [p.name for p in kernel.params]
        given = dict(zip(names, args, strict=False))
        given |= {name: x for name, x in options.items() if name in names}
        constants = {p.name for p in kernel.params if p.is_constexpr}
        kinds = {n: _kind(given[n], n in constants) for n in names}
        number = next(self._numbers)
        tensors = {n: x for n, x in given.items() if isinstance(x, torch.Tensor)}
        _refuse_devices(kernel.__name__, tensors.values())
        warps = options.get("num_warps", 4)
        self._functions[number] = _Function(
            run,
            kinds,
            given,
            {n: x.dtype for n, x in tensors.items()},
            {n: _bytes_from(x) for n, x in tensors.items()},
            {n: x for n, x in options.items() if n not in names},
            32 * warps,
            128 + number,
        )
        metadata = SimpleNamespace(
            num_warps=warps,
            warp_size=32,
            num_ctas=1,
            shared=128 + number,
            global_scratch_size=0,
            profile_scratch_size=0,
            launch_cooperative_grid=False,
            launch_pdl=False,
        )
        self.by_python.append(kernel.__name__)
        return SimpleNamespace(
            name=kernel.__name__,
            function=number,
            metadata=metadata,
            src=SimpleNamespace(signature=kinds),
        )

    def _tell_capturing(self, stream, status):
        status[0] = self.is_capturing
        return 0

    def _launch(self, number, gx, gy, gz, bx, by, bz, shared, stream, arguments, extra):
        if self.code:
            return self.code
        function = self._functions[number]
        self.launches.append(function.run.__self__.fn.__name__)
        if self.is_idle:
            return 0
        assert (bx, by, bz) == (function.threads, 1, 1)
        assert shared == function.shared
        position = itertools.count()
        given = {
            name: self._read(function, name, kind, arguments, position)
            for name, kind in function.kinds.items()
        }
        for _ in range(2):  # Triton's scratch, of which there is none
            at = ctypes.cast(arguments[next(position)], ctypes.POINTER(ctypes.c_void_p))
            assert not at[0]
        function.run(grid=(gx, gy, gz), warmup=False, **given, **function.options)
        if self.wrong:
            last = [x for x in given.values() if isinstance(x, torch.Tensor)][-1]
            last[0] += self.wrong
        return 0

    def _read(self, function, name, kind, arguments, position):
        if kind == "constexpr":
            return function.given[name]
        if isinstance(kind, tuple):
            return tuple(
                each if k == "constexpr" else self._number(k, arguments, position)
                for k, each in zip(kind, function.given[name], strict=True)
            )
        if not kind.startswith("*"):
            return self._number(kind, arguments, position)
        at = ctypes.cast(arguments[next(position)], ctypes.POINTER(ctypes.c_void_p))[0]
        memory = (ctypes.c_char * function.spans[name]).from_address(at)
        return torch.frombuffer(memory, dtype=function.dtypes[name])

    @staticmethod
    def _number(kind, arguments, position):
        at = ctypes.cast(arguments[next(position)], ctypes.POINTER(_TYPES[kind]))
        return at[0]


def _kind(value, is_constant):
    """As Triton's signatures have it: numbers that are 1 become constants."""
    if is_constant or value is None or value is True or value is False:
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return "*" + _KINDS[value.dtype]
    if isinstance(value, tuple):
        return tuple(_kind(x, False) for x in value)
    if isinstance(value, int):
        return "constexpr" if value == 1 else "i32" if abs(value) < 2**31 else "i64"
    return "fp32"


def _refuse_devices(name, tensors):
    """What is launched reads addresses, and those of a device end the process."""
    for x in tensors:
        if x.device.type != "cpu":
            raise ValueError(
                f"The imitated driver reads the host's memory, and {name} was given a "
                f"tensor on {x.device}. Ask for the fixture `driver`, which is the "
                "CPU's; what a GPU launches say the tests that are marked `gpu`."
            )


def _bytes_from(x):
    """From the first element of a tensor to the end of its memory."""
    storage = x.untyped_storage()
    return storage.nbytes() - (x.data_ptr() - storage.data_ptr())


@contextlib.contextmanager
def driving(kernels=None):
    """Everything that the probe computes goes the way of a GPU, on CPU tensors.

    `kernels` are the launchers of the extension, or emulated ones.
    """
    driver = FakeDriver()
    with_cuda = {} if kernels is None else cuda_ops(kernels)

    def op(self, first, *args, **kwargs):
        leader = first if isinstance(first, torch.Tensor) else first[0]
        _refuse_devices(self.name, [leader])
        found = with_cuda.get(self.name, self)
        backends = found.backends("cuda", leader.dtype)
        # The build's own CUDA kernels would want a GPU.
        ways = ("triton", "cuda", "reference") if with_cuda else ("triton", "reference")
        backend = next(way for way in ways if way in backends)
        run = found.on(backend, "cuda", leader.dtype)
        return run(*map(_in_memory, (first, *args)), **kwargs)  # as `Op` itself does

    host = learned()
    with interpreting(), contextlib.ExitStack() as stack:
        interpreted = JITFunction.run

        def run(self, *args, grid, warmup=False, **options):
            with _disable_current_modes():  # what the interpreter does is no operation
                interpreted(self, *args, grid=grid, warmup=warmup, **options)
            bound = interpreted.__get__(self)
            return driver.compiled(self, bound, args, options)

        for change in (
            mock.patch.object(JITFunction, "run", run),
            mock.patch.object(Op, "__call__", op),
            mock.patch.object(called, "can_be_launched", lambda device: True),
            mock.patch.object(
                making.Making, "is_for_kernels", property(lambda self: False)
            ),
        ):
            stack.enter_context(change)
        host.use_driver(*driver.addresses)
        try:
            yield driver
        finally:
            host.use_driver(0)
