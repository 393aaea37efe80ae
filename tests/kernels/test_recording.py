"""What is noted of a launch is what the compiled kernel takes."""

import importlib.util
import re
import weakref
from dataclasses import replace
from unittest import mock

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from triton.runtime.jit import JITFunction

from fastminima.ops import _launches
from fastminima.ops._launches import INPUT, OUTPUT, SCRATCH
from fastminima.ops._pieces import LIMIT
from fastminima.ops.conv_geometry import ConvGeometry
from fastminima.ops.recording import launch, recorded
from fastminima.ops.triton import conv, dense, norm, totals
from tools.kernels.compile import compiling

BYTES = {"u64": 8, "b64": 8, "s64": 8, "f64": 8, "u32": 4, "b32": 4, "f32": 4}
CONV = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1))


def parameters_of(ptx):
    """Bytes of each parameter of a kernel, as its code declares them."""
    entry = re.search(r"\.entry \w+\((.*?)\)", ptx, re.DOTALL)
    return [BYTES[kind] for kind in re.findall(r"\.param \.(\w+)", entry[1])]


def bytes_of(kind):
    if kind.startswith("*") or kind in ("i64", "u64", "fp64"):
        return 8
    return 4


@pytest.fixture
def compiled():
    """Kernels are compiled and not launched; those that were."""
    kernels = []
    with compiling("sm_90a"):
        run = JITFunction.run

        def with_function(self, *args, **options):
            kernel = run(self, *args, **options)
            kernel.function = 4096 + len(kernels)
            kernels.append(kernel)
            return kernel

        with mock.patch.object(JITFunction, "run", with_function):
            yield kernels


def half(*shape):
    return torch.zeros(*shape, dtype=torch.bfloat16)


CALLS = {
    "sequence": (
        lambda g, a: dense.sequence_sq_norms(a, g, True),
        lambda: (half(4, 64, 48), half(4, 64, 32)),
        2,
    ),
    "one row": (
        lambda g, a: dense.row_sq_norms(a, g),
        lambda: (half(4, 48), half(4, 32)),
        2,
    ),
    "direct": (
        lambda g, a: [dense.direct_sq_norms(a, g)],
        lambda: (half(4, 512, 48), half(4, 512, 32)),
        1,
    ),
    "layer norm": (
        lambda g, x, mean, rstd: [
            totals.sample_sq_norms(t)
            for t in norm.layer_norm_gradients(g, x, mean, rstd)
        ],
        lambda: (half(4, 64, 48), half(4, 64, 48), *torch.zeros(2, 4, 64).unbind()),
        2,
    ),
    "convolution with channels copied last": (
        lambda g, x: conv.conv_sq_norms(x, g, CONV, True),
        lambda: (half(4, 64, 9, 9), half(4, 96, 9, 9)),
        2,
    ),
    "depth-wise convolution": (
        lambda g, x: conv.conv_sq_norms(x, g, replace(CONV, groups=8), False)[:1],
        lambda: (half(4, 8, 9, 9), half(4, 8, 9, 9)),
        1,
    ),
    "convolution": (
        lambda g, x: conv.conv_sq_norms(x, g, CONV, True),
        lambda: (half(4, 8, 9, 9), half(4, 5, 9, 9)),
        2,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_are_those_of_the_compiled_kernel(compiled, name):
    run, inputs, outputs = CALLS[name]
    inputs = inputs()
    if name == "layer norm":
        inputs = (*inputs[:3], inputs[3].clone())
    _, found = recorded(run, inputs, [True] * outputs)
    assert found is not None
    assert found.kept == compiled
    written = set()
    for each, kernel in zip(found.launches, compiled, strict=True):
        function, grid, threads, shared, arguments, pointers = each
        declared = parameters_of(kernel.asm["ptx"])
        assert len(arguments) == len(declared)
        flat = _launches._flat(
            (k, None if not isinstance(k, tuple) else k)
            for k in kernel.src.signature.values()
        )
        kinds = [kind for kind, _ in flat]
        assert [*map(bytes_of, kinds), 8, 8] == declared
        assert {i for i, *_ in pointers} == {
            i for i, kind in enumerate(kinds) if kind.startswith("*")
        }
        assert function == kernel.function and len(grid) == 3
        assert threads == 32 * kernel.metadata.num_warps
        assert shared == kernel.metadata.shared
        written |= {(kind, number) for _, kind, number, _ in pointers}
    assert {(OUTPUT, i) for i in range(outputs)} <= written
    assert {(INPUT, i) for i in range(len(inputs))} <= written
    assert ((SCRATCH, 0) in written) == (found.bytes > 0)


def on_rows(g, a):
    return dense.row_sq_norms(a, g)


def launched_on_nothing(x, y):
    launch(totals._parts_kernel, (0,), x, y, y, 0, 0, 1, 1, 1, ITEMS=1, PARTS=1)
    return x, y


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda g, a: [x * 2 for x in on_rows(g, a)], "PyTorch computes"),
        (lambda g, a: [x.clamp_min_(0) for x in on_rows(g, a)], "in place"),
        (lambda g, a: [x[:2] for x in on_rows(g, a)], "a part of an allocation"),
        (lambda g, a: [g[:, 0], on_rows(g, a)[1]], "an input"),
        (lambda g, a: on_rows(g, torch.zeros(4, 32)), "zeros are filled"),
        (lambda g, a: on_rows(g, OTHER), "a tensor that is no input"),
        (lambda g, a: launched_on_nothing(*on_rows(g, a)), "no program in the grid"),
        (lambda g, a: (g.new_empty(4).float(), g.new_empty(4).float()), "no launch"),
    ],
)
def test_what_cannot_be_launched_again_is_not_noted(compiled, run, why):
    g, a = torch.zeros(4, 48), torch.zeros(4, 32)
    outputs, found = recorded(run, (g, a), [True, True])
    assert len(outputs) == 2
    assert found is None, why


OTHER = torch.zeros(4, 32)


def test_inputs_in_one_memory_are_not_noted(compiled):
    """Where they lie to each other may be otherwise in the next step."""
    both = torch.zeros(4, 80)
    _, found = recorded(on_rows, both.split([48, 32], dim=1), [True, True])
    assert found is None


def test_inputs_whose_memory_overlaps_are_not_noted(compiled):
    """As of tensors that share memory with another library."""
    memory = bytearray(4 * 4 * 48)
    g = torch.frombuffer(memory, dtype=torch.float32).view(4, 48)
    a = torch.frombuffer(memory, dtype=torch.float32, offset=64, count=128)
    a = a.view(4, 32)
    assert a.untyped_storage().data_ptr() > g.untyped_storage().data_ptr()
    assert recorded(on_rows, (g, a), [True, True])[1] is None


@pytest.mark.parametrize("pieces", [1, 3])
def test_no_more_memory_is_held_than_an_op_may(compiled, pieces):
    """Scratch lives as long as a pass, where an op's own memory is freed soon."""
    g, a = torch.zeros(4, 48), torch.zeros(4, 32)

    def holding(share):
        def run(g, a):
            for _ in range(pieces):
                g.new_empty(int(share * LIMIT / pieces / g.itemsize))
            return on_rows(g, a)

        return recorded(run, (g, a), [True, True])[1]

    assert holding(0.9) is not None
    assert holding(1.1) is None


@pytest.mark.parametrize("is_small", [False, True])
def test_a_recording_that_is_given_up_holds_nothing(compiled, is_small):
    """A way that goes through pieces holds one at a time, when it is recorded too."""
    g, a = torch.zeros(4, 48), torch.zeros(4, 32)
    alive = []

    def run(g, a):
        if is_small:
            g.sum()  # cannot be launched again
        pieces = []
        for _ in range(5):
            piece = g.new_empty(16, 1024 if is_small else LIMIT // 100)
            totals.last_added(piece)
            pieces.append(weakref.ref(piece))
            del piece
            alive.append(sum(ref() is not None for ref in pieces))
        return on_rows(g, a)

    assert recorded(run, (g, a), [True, True])[1] is None
    assert alive[-1] == 0


def test_kernels_with_memory_of_their_own_are_not_noted(compiled, monkeypatch):
    g, a = torch.zeros(4, 48), torch.zeros(4, 32)
    assert recorded(on_rows, (g, a), [True, True])[1] is not None
    for name in ("global_scratch_size", "launch_pdl", "num_ctas"):
        usual = _launches._is_plain

        def changed(metadata, name=name, usual=usual):
            return usual(metadata._replace(**{name: 2}))

        with monkeypatch.context() as patch:
            patch.setattr(_launches, "_is_plain", changed)
            assert recorded(on_rows, (g, a), [True, True])[1] is None
