"""The extension: PyTorch's OpenMP threads and no others, every instruction set."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastminima import _native
from fastminima.ops.dense import direct_sq_norms
from fastminima.ops.table import REGISTRY, Op
from fastminima.ops.vector import lanczos_step

native_only = pytest.mark.skipif(
    _native.missing_reason is not None, reason=str(_native.missing_reason)
)
linux_only = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc"
)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )


@native_only
@linux_only
def test_one_openmp_runtime():
    code = """
import torch, fastminima
from fastminima.ops.dense import direct_sq_norms
direct_sq_norms(torch.randn(64, 32, 48), torch.randn(64, 32, 48))
from pathlib import Path
import re
mapped = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
print(*(m for m in mapped if re.search(r"lib(gomp|omp|iomp5)[-.]", m)), sep="\\n")
print(*(m for m in mapped if "_native_ext" in m), sep="\\n")
"""
    runtime, *extension = python(code).stdout.split()
    assert len(extension) == 1 and "_native_ext" in extension[0]
    assert Path(runtime).name.startswith(("libgomp", "libomp", "libiomp5"))


@native_only
@linux_only
def test_no_openmp_runtime_is_linked():
    path = Path(_native._extension.__file__)
    for name in (b"libgomp.so", b"libomp.so", b"libiomp5.so"):
        assert name not in path.read_bytes()


@native_only
@pytest.mark.parametrize("count", [1, 2, 3])
def test_thread_count_follows_torch(set_threads, count):
    set_threads(count)
    assert _native.threads() == count
    assert _native.parallel_threads(_native.threads()) == count


@native_only
@linux_only
@pytest.mark.parametrize("count", [1, 2])
def test_a_kernel_runs_on_that_many_threads(set_threads, count):
    set_threads(count)
    a = torch.randn(64, 64, 256)
    direct_sq_norms(a, a)  # wakes the workers
    before = cpu_times()
    for _ in range(20):
        direct_sq_norms(a, a)
    after = cpu_times()
    spent = [after[task] - before.get(task, 0) for task in after]
    # A waiting worker may spin for a moment; one that works takes a share of the tiles.
    assert sum(t > max(spent) / 10 for t in spent) == count


def cpu_times():
    """Processor time of each thread of this process, in nanoseconds."""
    return {
        task.name: int((task / "schedstat").read_text().split()[0])
        for task in Path("/proc/self/task").iterdir()
    }


@native_only
@pytest.mark.parametrize("isa", _native.available_isas())
def test_every_instruction_set_agrees(isa):
    first = isa == _native.available_isas()[0]
    run = direct_sq_norms.on(
        "native" if first else f"native-{isa}", "cpu", torch.float32
    )
    a, g = torch.randn(3, 7, 33), torch.randn(3, 7, 17)
    want = direct_sq_norms.reference(a.double(), g.double())
    torch.testing.assert_close(run(a, g), want.float())


@native_only
def test_the_best_instruction_set_comes_first():
    isas = _native.available_isas()
    order = ["avx512", "avx2", "generic"]
    assert list(isas) == [isa for isa in order if isa in isas]
    assert isas[-1] == "generic"
    assert _native.kernels is _native.kernels_for(isas[0])


def test_unknown_instruction_set():
    with pytest.raises(LookupError, match="'mmx'"):
        _native.kernels_for("mmx")


def test_switched_off_at_run_time():
    code = """
import warnings
warnings.simplefilter("error")
import torch, fastminima
from fastminima import _native
from fastminima.ops.dense import direct_sq_norms
print(_native.missing_reason, direct_sq_norms.backends("cpu", torch.float32))
"""
    out = python(code, FASTMINIMA_NATIVE="0").stdout
    assert out.strip() == "switched off by FASTMINIMA_NATIVE=0 ('reference',)"


@native_only
@linux_only
def test_openmp_symbols_that_do_not_resolve_are_told_apart():
    # Without torch nothing in the process offers OpenMP, as with a torch that hides it.
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_native_ext", {_extension_path()!r})
try:
    importlib.util.module_from_spec(spec)
except ImportError as error:
    print(error)
"""
    message = python(code).stdout
    assert _native._is_openmp_missing(ImportError(message)), message
    assert not _native._is_openmp_missing(ImportError("No module named 'numpy'"))


def _extension_path():
    spec = importlib.util.find_spec("fastminima._native_ext")
    return "" if spec is None else spec.origin


def test_a_missing_extension_is_announced():
    with pytest.warns(UserWarning, match=r"without its native kernels.*no g\+\+"):
        _native._announce("not built: no g++")


cuda_only = pytest.mark.skipif(
    _native.cuda_missing_reason() is not None, reason=str(_native.cuda_missing_reason())
)


def test_cuda_kernels_or_a_reason():
    reason = _native.cuda_missing_reason()
    assert (reason is None) == (_native.cuda_kernels() is not None)
    assert bool(_native.cuda_architectures()) == (reason is None)
    assert reason is None or "\n" not in reason


@pytest.mark.parametrize("built", [True, False])
def test_cuda_is_in_the_table_where_it_was_built(monkeypatch, built):
    kernels = object() if built else None
    monkeypatch.setattr(_native, "cuda_kernels", lambda: kernels)
    op = Op("native_test", lambda x: x)
    try:
        run_with = {"dtypes": (torch.float32,), "preferred": False}
        op.add_cuda(lambda module, x: (module, x), **run_with)
        names = op.backends("cuda", torch.float32)
        assert names == (("reference", "cuda") if built else ("reference",))
        if built:
            run, x = op.on("cuda", "cuda", torch.float32), torch.ones(2)
            assert run(x) == (kernels, x) and run([x])[0] is kernels
    finally:
        del REGISTRY["native_test"]


@cuda_only
def test_every_launcher_is_bound_and_refuses_cleanly_without_a_device():
    kernels = _native.cuda_kernels()
    for name in ("lanczos_step_f32", "langevin_step_bf16", "embedding_sq_norms_f16"):
        assert callable(getattr(kernels, name))
    assert kernels.vector_partials(10, 3) == 3
    assert "cuda" in lanczos_step.backends("cuda", torch.float32)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA error"):
            kernels.sort_steps(0, 1, 1, 1, 1, 1, -1, 0, 0)


@cuda_only
@linux_only
def test_no_cuda_library_is_linked():
    content = Path(_native._extension.__file__).read_bytes()
    assert b"libcudart.so" not in content
    assert _native.cuda_architectures()[0].startswith("sm_")


def test_triton_is_not_imported_until_a_kernel_runs():
    code = (
        "import sys, torch, fastminima as fm\n"
        "model = torch.nn.Linear(3, 2)\n"
        "fm.GradientProbe(model).backward(model(torch.randn(4, 3)).sum(1))\n"
        "fm.GradientProbe(model, mode='fused')\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'triton']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@native_only
@linux_only
def test_a_runtime_that_pytorch_keeps_to_itself_is_shared(monkeypatch):
    """As by the wheels for Linux on ARM; nothing is loaded that was not there."""
    tried, shared = [], []

    def import_module(name):
        tried.append(name)
        if not shared:
            raise ImportError("undefined symbol: omp_get_thread_num")
        return sys.modules[name]

    monkeypatch.setattr(_native.importlib, "import_module", import_module)
    monkeypatch.setattr(_native.ctypes, "CDLL", lambda name, mode: shared.append(mode))
    extension, reason = _native._load()
    assert extension is sys.modules["fastminima._native_ext"] and reason is None
    assert len(tried) == 2
    only_there = os.RTLD_GLOBAL | os.RTLD_NOLOAD
    assert all(mode & only_there == only_there for mode in shared)
