"""No way of computing holds more than 64 MiB, or than its arguments, at a time.

Sizes are known before anything is computed, so tensors without data will do: those of
the benchmark workloads with 32 times their batch.
"""

import importlib.util

import pytest
import torch
from held import bytes_of, held
from layer_sizes import arguments, layers
from torch.utils._pytree import tree_leaves

from benchmarks.kernels.cases import Tensors, all_ops
from benchmarks.workloads import WORKLOADS
from fastminima.ops import _pieces

DTYPES = [torch.float32, torch.bfloat16]
OPS = all_ops()
# They count distinct ids, which tensors without data have none of.
BY_VALUE = {
    "embedding_sq_norms",
    "embedding_gram",
    "embedding_second_moment",
    "embedding_gradients",
}
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
@pytest.mark.parametrize("workload", WORKLOADS)
def test_references(workload, dtype):
    checked = 0
    for op, args in calls(workload, dtype):
        if op.name not in BY_VALUE:
            check(op.reference, args, f"{op.name} by reference")
            checked += 1
    assert checked >= 10


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_launchers(workload, dtype):
    from kernels.capturable import capturing

    for op, args in calls(workload, dtype):
        key = tensors(args)[0].dtype
        if "triton" not in op.backends("cuda", key):
            continue
        with capturing():
            check(op.on("triton", "cuda", key), args, f"{op.name} by Triton")
