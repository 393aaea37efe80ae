"""Where the CUDA kernels run: the emulated device, and a real one if there is one."""

import importlib.util

import pytest
import torch

from fastminima import _native

collect_ignore_glob = []
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob.append("test_triton_*.py")


class Device:
    """Kernels, the device of their tensors, and the ways to run them."""

    def __init__(self, name, kernels, schedules):
        self.name = name
        self.kernels = kernels
        self.schedules = schedules

    def every(self, case):
        """What `case` returns, the same bits each time it is run."""
        first = None
        for schedule in self.schedules:
            schedule()
            got = case()
            if first is None:
                first = got
            for a, b in zip(first, got, strict=True):
                assert torch.equal(a, b), (
                    "the result depends on the order of the threads"
                )
        return [x.cpu() for x in first]

    def put(self, x):
        """A copy of `x` on this device, with its strides and its offset."""
        if x is None:
            return None
        flat = torch.empty(
            x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype
        )
        flat = flat.to(self.name)
        return flat.as_strided(x.size(), x.stride(), x.storage_offset()).copy_(x)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cpu":
        kernels = request.getfixturevalue("emulated")
        orders = ("reverse", "random")  # forward hides most missing barriers
        return Device(
            "cpu",
            kernels,
            [lambda o=order: kernels.set_schedule(o) for order in orders],
        )
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if _native.cuda_kernels() is None:
        pytest.skip(str(_native.cuda_missing_reason()))
    return Device("cuda", _native.cuda_kernels(), [torch.cuda.synchronize] * 2)
