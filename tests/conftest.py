"""What every test runs under."""

import functools
import gc
import os

import apart
import placing
import pytest
import torch

# cuBLAS adds up in the same order only so; it reads this when it is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Collection imports and makes objects that stay: looking through them again and again
# was a quarter of its time.
gc.disable()


def pytest_collection_finish():
    gc.enable()


def pytest_collection_modifyitems(items):
    """Files with slow tests go first: the last one leaves no core idle for long."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="module")
def _kept():
    """What is there before a file's tests is nothing that they could leave behind.

    The garbage collector looks at the rest, which is a tenth of it.
    """
    gc.collect()
    gc.freeze()


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
        help="PyTorch's default device: where what does not say it would be",
    )
    group.addoption(
        "--default-dtype",
        default=None,
        help="PyTorch's default dtype: of what the rest would be",
    )


@pytest.fixture(scope="session")
def device(request):
    """Where models and batches are."""
    name = request.config.getoption("--device")
    if name == "apart":
        apart.register()
    if name.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = False
        # Not through torch.backends, which PyTorch's own test helpers close.
        torch._C._set_cudnn_allow_tf32(False)
    return torch.device(name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except apart.Unsupported as problem:
        pytest.skip(str(problem))
    except RuntimeError as problem:
        if "opt_ready_stream" not in str(problem):
            raise
        pytest.skip("the engine asks for streams, and the device `apart` has none")


@pytest.fixture(autouse=True)
def _deterministic():
    """Fill what `torch.empty` returns with NaN: a forgotten tile cannot pass."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def autocast(device):
    """`torch.autocast` on the device, a function of the dtype."""
    if device.type == "apart":
        pytest.skip("the device `apart` has no autocast")
    return functools.partial(torch.autocast, device.type)


@pytest.fixture
def generator(device):
    """A function of a seed: a generator of random numbers on the device."""
    if device.type == "apart":
        pytest.skip("the device `apart` has no generator of its own")
    return lambda seed=0: torch.Generator(device).manual_seed(seed)


@pytest.fixture
def on_the_cpu(device):
    """For what is the CPU's alone."""
    if device.type != "cpu":
        pytest.skip("about the CPU")


@pytest.fixture
def not_apart(device):
    """For what the wrappers of `apart` hide: flags, storages, a parameter's type."""
    if device.type == "apart":
        pytest.skip("the device `apart` does not imitate it")


@pytest.fixture
def placed(request, device):
    """Put what the test makes onto the device, under the defaults asked for."""
    default_device = request.config.getoption("--default-device")
    default_dtype = request.config.getoption("--default-dtype")
    if device.type == "cpu" and default_device is None and default_dtype is None:
        yield
        return
    dtype = None if default_dtype is None else getattr(torch, default_dtype)
    with placing.defaults(default_device, dtype, tests_on=device):
        yield


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The launchers of CUDA kernels, on the emulated device."""
    from tools.kernels import emulator

    folder = tmp_path_factory.mktemp("emulated")
    if reason := emulator.missing([], folder):
        pytest.skip(reason)
    sources = [*emulator.KERNELS, emulator.HERE / "emulated.cpp"]
    flags = ["-shared", "-fPIC"]
    return emulator.Emulated(emulator.build(folder / "emulated.so", sources, flags))
