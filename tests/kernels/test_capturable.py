"""No launcher looks at the device: each could be captured in a CUDA graph."""

import importlib.util

import pytest
import torch

from tools.kernels.cases import ARGUMENTS, Tensors, all_ops, launched

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
import triton.language as tl
from torch.utils._pytree import tree_leaves

from fastminima.ops.table import Op
from tools.kernels.capturable import (
    CudaStandIn,
    NotCapturableError,
    capturing,
    cuda_ops,
)

CASES = {case.label: case for case in launched()}


@triton.jit
def _double(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, 2 * tl.load(x_ptr + i))


def _assign_by_mask(x):
    x[x > 0] = x.new_empty(3)


NOT_CAPTURABLE = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: 1 if x.sum() > 0 else 0,
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "mask": lambda x: x[x > 0],
    "values by mask": _assign_by_mask,
    "equal": lambda x: torch.equal(x, x),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "from the host": lambda x: torch.ones(4).to(x.device),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "host pointer": lambda x: _double[(1,)](HOST, BLOCK=4),
}
HOST = torch.ones(4)


@pytest.mark.parametrize("what", NOT_CAPTURABLE)
def test_what_a_graph_cannot_hold_is_refused(what):
    x = torch.empty(4, device="meta")
    with pytest.raises(NotCapturableError), capturing():
        NOT_CAPTURABLE[what](x)


def test_launches_are_noted():
    x = torch.empty(4, device="meta")
    with capturing() as launches:
        y = x.new_zeros(4) + x.sum(dim=0)
        y[y > 0] = 0.0
        _double[lambda options: (options["BLOCK"] // 2,)](y, BLOCK=4)
    (launch,) = launches
    assert (launch.kernel, launch.grid) == ("_double", (2,))
    assert ("BLOCK", 4) in launch.values


def test_cuda_launchers_are_capturable():
    """Those of the extension, whether or not it was built with them here."""
    stand_in = CudaStandIn()
    checked = 0
    for name, op in cuda_ops(stand_in).items():
        for make in ARGUMENTS.get(name, {}).values():
            arguments = make(Tensors("meta", torch.float32))
            first = tree_leaves(arguments)[0]
            if "cuda" not in op.backends("cuda", first.dtype):
                continue
            stand_in.launches.clear()
            with capturing():
                op.on("cuda", "cuda", first.dtype)(*arguments)
            assert stand_in.launches, name
            checked += 1
    has_cuda = hasattr(Op, "add_cuda")
    assert bool(checked) == has_cuda


def _is_on_gpu(op):
    return any("cuda" in i.devices and i.backend != "torch" for i in op)


def test_every_op_with_a_kernel_has_arguments():
    """An op that is missing in tools/kernels/cases.py is neither checked here,
    nor compiled by the report on kernels.
    """
    found = all_ops() | cuda_ops(CudaStandIn())
    with_kernel = {name for name, op in found.items() if _is_on_gpu(op)}
    assert with_kernel <= set(ARGUMENTS)


@pytest.mark.parametrize("label", CASES)
def test_launchers_are_capturable(label):
    """Twice the same: a graph is captured after a run that warms up."""
    case = CASES[label]
    found = []
    for _ in range(2):
        with capturing() as launches:
            case.launch(Tensors("meta", case.dtype))
        found.append(launches)
    assert found[0] and found[0] == found[1]
