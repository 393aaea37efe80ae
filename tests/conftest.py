"""What every test runs under."""

import contextlib

import apart
import placing
import pytest
import torch


def pytest_addoption(parser):
    group = parser.getgroup("fastminima")
    group.addoption(
        "--device",
        default="cpu",
        help="where models and batches are; `apart` is a device that needs no GPU",
    )
    group.addoption(
        "--default-device",
        default=None,
        help="PyTorch's default device, for what the package makes without saying where",
    )
    group.addoption(
        "--default-dtype",
        default=None,
        help="PyTorch's default dtype, for what the package makes without saying which",
    )


@pytest.fixture(scope="session")
def device(request):
    """Where models and batches are."""
    name = request.config.getoption("--device")
    if name == "apart":
        apart.register()
    if name.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except apart.Unsupported as problem:
        pytest.skip(str(problem))


@pytest.fixture(autouse=True)
def _deterministic():
    """Fill what `torch.empty` returns with NaN: a forgotten tile cannot pass."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def placed(request, device):
    """Put what the test makes onto the device, under the defaults asked for."""
    default_device = request.config.getoption("--default-device")
    default_dtype = request.config.getoption("--default-dtype")
    if device.type == "cpu" and default_device is None and default_dtype is None:
        yield
        return
    kept = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        if default_device is not None:
            stack.enter_context(torch.device(default_device))
        stack.enter_context(placing.Placed(device))
        if default_dtype is not None:
            torch.set_default_dtype(getattr(torch, default_dtype))
        try:
            yield
        finally:
            torch.set_default_dtype(kept)
