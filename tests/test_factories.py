"""Every tensor that the package makes says where it is and of what dtype.

A default that a user has set, `torch.set_default_device` or `set_default_dtype`, is for
the user's own tensors.
"""

import ast
from pathlib import Path

import pytest

import fastminima

ROOT = Path(fastminima.__file__).parent
# What makes a tensor out of sizes or numbers; `*_like` and `new_*` follow a tensor.
FLOATING = {  # the default dtype decides
    *("arange", "as_tensor", "asarray", "complex", "empty", "empty_strided", "eye"),
    *("full", "linspace", "logspace", "normal", "ones", "rand", "randn", "range"),
    *("scalar_tensor", "sparse_coo_tensor", "tensor", "zeros", "hann_window"),
}
OTHERS = {"Generator", "randint", "randperm", "tril_indices", "triu_indices"}
# Constructors without a device that could be said: they follow the defaults.
FORBIDDEN = {
    *("Tensor", "FloatTensor", "DoubleTensor", "HalfTensor", "BFloat16Tensor"),
    *("LongTensor", "IntTensor", "ByteTensor", "BoolTensor"),
    *("get_default_dtype", "get_default_device"),
}
# (file, call): a default is what is meant.
EXCEPTIONS = {
    # of an operator that says none itself
    ("spectrum/_problem.py", "torch.get_default_dtype()"),
}
_NOT_YET = {
    *("capture/fitting.py", "capture/probe.py", "capture/routes.py"),
    "curvature/_guard.py",
}


def faults(source):
    """Line and text of each call that leaves the device or the dtype to a default."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if not (
            isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        ):
            continue
        name, said = node.func.attr, {keyword.arg for keyword in node.keywords}
        if name == "Generator" and node.args:
            said.add("device")
        wanted = {"device"} if name in FLOATING | OTHERS else set()
        if name in FLOATING:
            wanted.add("dtype")
        if name in FORBIDDEN or not wanted <= said:
            yield node.lineno, ast.unparse(node)


def imported(source):
    """Names of factories imported from torch, which `faults` would not see."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            names = {alias.name for alias in node.names}
            yield from names & (FLOATING | OTHERS | FORBIDDEN - {"Tensor"})  # a type


def files():
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py"))


@pytest.mark.parametrize("name", files())
def test_factories_say_device_and_dtype(name):
    if name in _NOT_YET:
        pytest.skip("to be done")
    source = (ROOT / name).read_text()
    found = [
        f"line {line}: {call}"
        for line, call in faults(source)
        if (name, call) not in EXCEPTIONS
    ]
    assert not found, f"{name} leaves a device or dtype to a default: {found}"
    assert not list(imported(source)), (
        "write torch.name(...), so that it can be checked"
    )


@pytest.mark.parametrize(
    "call",
    [
        "torch.arange(3)",
        "torch.arange(3, device='cpu')",
        "torch.zeros((), dtype=torch.float64)",
        "torch.tensor([x.data_ptr() for x in xs], dtype=torch.int64)",
        "torch.randperm(count, generator=generator)",
        "torch.Generator()",
        "torch.Tensor(3)",
        "torch.as_tensor(1.0)",
        "f(torch.ones(2))",
    ],
)
def test_a_planted_default_is_found(call):
    assert len(list(faults(f"def f():\n    return {call}"))) == 1


@pytest.mark.parametrize(
    "call",
    [
        "torch.arange(3, dtype=torch.int64, device='cpu')",
        "torch.Generator('cpu')",
        "torch.randperm(3, device='cpu')",
        "torch.zeros_like(x)",
        "x.new_zeros(3)",
        "torch.from_numpy(x)",
    ],
)
def test_what_follows_its_arguments_is_not(call):
    assert not list(faults(call))


def test_the_exceptions_are_needed():
    for name, call in EXCEPTIONS:
        assert call in {c for _, c in faults((ROOT / name).read_text())}, (name, call)
