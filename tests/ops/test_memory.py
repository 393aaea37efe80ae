"""No way of computing holds more than 64 MiB, or than its arguments, at a time.

Sizes are known before anything is computed, so tensors without data will do: those of
the benchmark workloads with 32 times their batch, or 8 times where pieces are many.
"""

import importlib.util
from itertools import chain

import pytest
import torch
from bytes_held import bytes_of, held
from layer_sizes import arguments, layers
from torch.utils._pytree import tree_leaves

from benchmarks.workloads import WORKLOADS
from fastminima.ops import _pieces
from fastminima.ops.random import Noise
from tools.kernels.capturable import CudaStandIn, cuda_ops
from tools.kernels.cases import ARGUMENTS, Tensors, all_ops, launchers

DTYPES = [torch.float32, torch.bfloat16]
OPS = all_ops()
# They count distinct ids, which tensors without data have none of.
BY_VALUE = {
    "embedding_sq_norms",
    "embedding_gram",
    "embedding_second_moment",
    "embedding_gradients",
}
SLOW = ("W3", "W4", "W5")  # many samples or layers, and many pieces
# At the sizes of W6, 50257 columns, `sequence_gram` (reference, Triton) and
# `embedding_dots` (CUDA) hold more than this allows.
NAMES = [name for name in WORKLOADS if name != "W6"]
LAYERED = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in NAMES
]
HAS_TRITON = importlib.util.find_spec("triton") is not None


def allowed(args):
    return max(_pieces.LIMIT, bytes_of(args))


def check(run, args, what):
    found = held(lambda: run(*args))
    mib = 2**-20
    assert found.most <= allowed(args), (
        f"{what} holds {found.most * mib:.1f} MiB after {found.by}; its arguments take "
        f"{bytes_of(args) * mib:.1f} MiB: {[tuple(x.shape) for x in tensors(args)]}"
    )


def tensors(args):
    return [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]


def calls(workload, dtype, times=32, device="meta"):
    new = Tensors(device, dtype)
    for layer in layers(workload, times):
        for name, args in arguments(layer, new):
            yield OPS[name], args


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workload", LAYERED)
def test_references(workload, dtype):
    checked = 0
    times = 8 if workload == "W3" else 32  # still beyond what may be held
    for op, args in calls(workload, dtype, times):
        if op.name not in BY_VALUE:
            check(op.reference, args, f"{op.name} by reference")
            checked += 1
    assert checked >= 10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workload", NAMES)
def test_vectors(workload, dtype):
    """Lists of a model's parameters twice over, and as one vector."""
    for name, args in vector_arguments(workload, dtype, 2, "meta"):
        check(OPS[name].reference, args, f"{name} by reference")


def vector_arguments(workload, dtype, times, device):
    with torch.device("meta"):
        model = WORKLOADS[workload].make_model()
    new = Tensors(device, dtype)

    def some():
        return [new.normal(*p.shape) for _ in range(times) for p in model.parameters()]

    yield "multi_sq_norm", (some(),)
    params = some()
    noise = Noise(1, 2, range(len(params)), 0.3)
    yield "langevin_step_", (params, some(), some(), 0.1, 0.9, noise)
    yield "langevin_step_", (params, some(), None, 0.1, 0.0, noise)
    count = sum(p.numel() for p in model.parameters()) * times
    yield "sq_norm", (new.normal(count),)
    if dtype == torch.float32:  # what is there is in the accumulation dtype
        yield "sample_sq_norms", (new.normal(times, count),)
    if dtype == torch.float32:  # vectors are not narrower
        w, v, u = (new.normal(count) for _ in range(3))
        yield "lanczos_step", (w, v, u, new.normal().double())
        yield "power_step", (w, v, 0.5, u)
        yield "dots", (w, [v, u])
        yield "project_out", (w, [v, u])
        yield "linear_combinations", (w, [v, u], new.normal(3, 2))
        if device != "meta":
            yield "same_values", (w, v)


# They have no layer of their own in a workload.
ATTENTION = [name for name in OPS if name.startswith("attention")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name, dtype):
    from tools.kernels.capturable import capturing

    for make in ARGUMENTS[name].values():
        args = make(Tensors("meta", dtype))
        check(OPS[name].reference, args, f"{name} by reference")
        for backend in launchers(OPS[name], dtype):
            with capturing():
                check(
                    OPS[name].on(backend, "cuda", dtype), args, f"{name} by {backend}"
                )


# A workload's own batch and the parameters of one model, and a limit that they pass.
SMALL = {"W1": 1 << 18, "W2": 1 << 20, "W4": 1 << 20, "W5": 1 << 20}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("workload", SMALL)
def test_every_way_on_a_cpu(monkeypatch, workload, dtype):
    """With a small limit, so that tensors with data pass it, and wrappers of kernels
    can be run.
    """
    monkeypatch.setattr(_pieces, "LIMIT", SMALL[workload])
    found = layers(workload, 1)
    some = {layer.kind: layer for layer in (*found, *reversed(found))}  # first, and
    some |= {f"last {layer.kind}": layer for layer in found}  # last of each kind
    new, seen = Tensors("cpu", dtype), set()
    for layer in some.values():
        smaller = layer._replace(x=(8, *layer.x[1:]), y=(8, *layer.y[1:]))
        for name, args in arguments(smaller, new):
            seen.add(name)
            key = tensors(args)[0].dtype
            for backend in OPS[name].backends("cpu", key):
                run = OPS[name].on(backend, "cpu", key)
                check(run, args, f"{name} by {backend}")
    assert len(seen) >= 12 or workload == "W1"


def test_every_op_is_looked_at():
    names = {
        name for w in NAMES for op, _ in calls(w, DTYPES[0], 1) for name in [op.name]
    }
    names |= {name for name, _ in vector_arguments("W1", DTYPES[0], 1, "cpu")}
    assert names | set(ATTENTION) == set(OPS)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workload", LAYERED)
def test_launchers(workload, dtype):
    from tools.kernels.capturable import capturing

    for op, args in calls(workload, dtype):
        key = tensors(args)[0].dtype
        for backend in launchers(op, key):
            with capturing():
                check(op.on(backend, "cuda", key), args, f"{op.name} by {backend}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workload", NAMES)
def test_cuda_launchers(workload, dtype):
    """Those of the extension, whether or not it was built with them here."""
    stand_in = CudaStandIn()
    found = cuda_ops(stand_in)
    of_layers = ((op.name, args) for op, args in calls(workload, dtype))
    of_vectors = vector_arguments(workload, dtype, 2, "meta")
    for name, args in chain(of_layers, of_vectors):
        key = tensors(args)[0].dtype
        if "cuda" in found[name].backends("cuda", key):
            check(found[name].on("cuda", "cuda", key), args, f"{name} by CUDA")
