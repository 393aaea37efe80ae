"""A device that is not the CPU, on the CPU: `--device apart`.

Its tensors are wrappers that no host code can read: an operation that mixes them with
tensors of the CPU is an error, as on a GPU, and so is `numpy()`. Hooks run in a thread
of the device. Values are the CPU's own.
"""

import copy
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils import _python_dispatch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _DummyPrivateUse1Hook

__all__ = ["Unsupported", "register"]

aten = torch.ops.aten
# They take a tensor of the CPU beside one of the device.
_MIXING = {
    *("aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put"),
    *("aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"),
}
# They resize what they fill, which a wrapper cannot follow.
_FACTORIES = (
    *("arange", "arange.start", "arange.start_step", "linspace", "logspace", "eye"),
    *("eye.m", "randperm", "randperm.generator", "tril_indices", "triu_indices"),
)
_CPU = torch.device("cpu")
_KEPT = []  # what is registered ends with its library


# Kernels that PyTorch has for GPUs only; where it uses them it depends on the device.
_ON_GPUS_ONLY = {"aten::_thnn_fused_gru_cell", "aten::_thnn_fused_lstm_cell"}
# What is given lengths of the CPU, and gives some back.
_ON_BOTH = {"aten::_pack_padded_sequence", "aten::_pad_packed_sequence"}


class Unsupported(NotImplementedError):
    """What the device cannot imitate."""


class Apart(torch.Tensor):
    """A tensor of the device; `inner` has its values."""

    @staticmethod
    def __new__(cls, inner):
        if inner.is_nested or inner.layout != torch.strided:
            raise Unsupported("the device `apart` has dense tensors only")
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="apart:0",
        )

    def __init__(self, inner):
        self.inner = inner

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, new):
        torch.Tensor.data.__set__(self, new)
        self.inner = new.inner

    def data_ptr(self):
        return self.inner.data_ptr()

    def numpy(self, *_, **__):
        raise TypeError("can't convert a tensor of the device `apart` to numpy")

    def __repr__(self):
        return f"Apart({self.inner!r})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            with torch.no_grad():
                copied = Apart(copy.deepcopy(self.inner))
            copied.requires_grad_(self.requires_grad)
            copied._is_param = getattr(self, "_is_param", False)
            if not copied._is_param:  # as PyTorch's own do
                copied.grad = copy.deepcopy(self.grad, memo)
            memo[id(self)] = copied
        return memo[id(self)]

    def __format__(self, spec):
        return format(self.inner, spec)

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        target = kwargs.get("device")
        if target is not None:
            kwargs["device"] = _CPU
        if func._schema.name in _ON_GPUS_ONLY | _ON_BOTH:
            raise Unsupported(f"the device `apart` has no {func}")
        if func._schema.name not in _MIXING:
            _refuse_mixing(func, (args, kwargs))
        args_inside = tree_map(_inner, args)
        if func is aten.histc.default and not args_inside[0].is_floating_point():
            args_inside = (args_inside[0].double(), *args_inside[1:])  # as GPUs take it
        out = func(*args_inside, **tree_map(_inner, kwargs))
        if target is not None and torch.device(target).type == "cpu":
            return out
        if func._schema.name == "aten::copy_" and not isinstance(args[0], Apart):
            return args[0]
        out = tree_map(_wrapped, out)
        return _python_dispatch.return_and_correct_aliasing(func, args, kwargs, out)


def _inner(x):
    return x.inner if isinstance(x, Apart) else x


def _wrapped(x):
    return Apart(x) if isinstance(x, torch.Tensor) and not isinstance(x, Apart) else x


def _refuse_mixing(func, given):
    tensors = [x for x in torch.utils._pytree.tree_leaves(given) if torch.is_tensor(x)]
    if any(
        type(x) is not Apart and x.device.type == "cpu" and x.dim() for x in tensors
    ):
        raise RuntimeError(
            f"{func}: expected all tensors to be on one device, found cpu and apart"
        )


class _Module:
    """What PyTorch asks of a device's module."""

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def device_count():
        return 1

    @staticmethod
    def current_device():
        return 0

    @staticmethod
    def _is_in_bad_fork():
        return False

    @staticmethod
    def manual_seed_all(seed):
        pass

    @staticmethod
    def get_rng_state(device=None):
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state, device=None):
        torch.set_rng_state(state)

    @staticmethod
    def get_amp_supported_dtype():
        return [torch.bfloat16, torch.float16]


def register():
    """Make the device known to PyTorch, once a process."""
    torch.utils.rename_privateuse1_backend("apart")
    torch.utils.generate_methods_for_privateuse1_backend()
    torch._register_device_module("apart", _Module())
    torch._C._acc.register_python_privateuseone_hook(_DummyPrivateUse1Hook())
    with tempfile.TemporaryDirectory() as folder:
        torch.ops.load_library(_build_guard(Path(folder)))
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    for name in _FACTORIES:
        library.impl(name, _factory(name), "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    _KEPT.append(library)


def _build_guard(folder):
    """The engine asks it in C++, so that hooks may raise in the device's thread."""
    torch_folder = Path(torch.__file__).parent
    library = folder / "guard.so"
    source = Path(__file__).with_name("apart_guard.cpp")
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-shared", "-fPIC"]
    command += [f"-I{torch_folder / 'include'}", str(source), "-o", str(library)]
    command += [f"-L{torch_folder / 'lib'}", "-lc10"]
    subprocess.run(command, check=True)
    return library


def _empty(size, dtype=None, memory_format=None, **_):
    memory_format = memory_format or torch.contiguous_format
    return Apart(
        torch.empty(size, dtype=dtype, device=_CPU, memory_format=memory_format)
    )


def _factory(name):
    packet, _, overload = name.partition(".")
    op = getattr(getattr(aten, packet), overload or "default")

    def made(*args, device=None, layout=None, pin_memory=None, **kwargs):
        return Apart(op(*args, device=_CPU, **kwargs))

    return made


def _copy_from(source, target, non_blocking=False):
    _inner(target).copy_(_inner(source))
    return target


def _empty_strided(size, stride, dtype=None, **_):
    return Apart(torch.empty_strided(size, stride, dtype=dtype, device=_CPU))
