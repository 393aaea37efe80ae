"""The check of Triton kernels: planted faults are caught, clean kernels pass."""

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tools.kernels.interpreter import CheckError, Report, interpreting

BLOCK = 64


@triton.jit
def double_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lanes, mask=lanes < n, other=0.0)
    tl.store(out_ptr + lanes, 2 * x.to(tl.float32), mask=lanes < n)


@triton.jit
def unmasked_load_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, tl.load(x_ptr + lanes), mask=lanes < n)


@triton.jit
def unmasked_store_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, tl.load(x_ptr + lanes, mask=lanes < n, other=0.0))


@triton.jit
def no_other_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + lanes, mask=lanes < n)))


@triton.jit
def running_sum_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.sum(tl.load(x_ptr + lanes, mask=lanes < n, other=0.0))
    tl.store(out_ptr, tl.load(out_ptr) + part)


@triton.jit
def neighbour_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Each program reads what the one before it writes."""
    first = tl.program_id(0) * BLOCK
    lanes = first + tl.arange(0, BLOCK)
    before = tl.load(out_ptr + first - 1, mask=first > 0, other=0.0)
    x = tl.load(x_ptr + lanes, mask=lanes < n, other=0.0)
    tl.store(out_ptr + lanes, x + before, mask=lanes < n)


@triton.jit
def atomic_sum_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lanes, mask=lanes < n, other=0.0)
    tl.atomic_add(out_ptr, tl.sum(x))


@triton.jit
def same_lane_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes // 2, tl.load(x_ptr + lanes, mask=lanes < n, other=0.0))


@triton.jit
def square_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lanes, mask=lanes < n, other=0.0)
    tl.store(out_ptr + lanes, x * x, mask=lanes < n)


@triton.jit
def sum_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lanes, mask=lanes < n, other=0.0)
    tl.store(out_ptr, x.sum().to(tl.float32))


@triton.jit
def product_kernel(x_ptr, y_ptr, out_ptr, n, N: tl.constexpr, PRECISION: tl.constexpr):
    """out = x @ y, one program; rows and columns of N."""
    lanes = tl.arange(0, N)
    places = lanes[:, None] * N + lanes[None, :]
    x, y = tl.load(x_ptr + places), tl.load(y_ptr + places)
    out = tl.dot(x, y, input_precision=PRECISION)
    tl.store(out_ptr + places, out)


def launch(kernel, x, out, n=None, **options):
    n = x.numel() if n is None else n
    with interpreting(report=Report(**options)) as report:
        kernel[(triton.cdiv(n, BLOCK),)](x, out, n, BLOCK=BLOCK)
    return report


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_clean_kernel_passes_and_is_counted(dtype, order):
    x, out = torch.randn(150).to(dtype), torch.empty(150)
    report = launch(double_kernel, x, out, order=order)
    torch.testing.assert_close(out, 2 * x.float(), rtol=0, atol=0)
    assert report.launches == 1
    assert report.programs == 3
    assert report.load_bytes == report.unique_load_bytes == 150 * x.element_size()
    assert report.store_bytes == report.unique_store_bytes == 600
    assert report.per_launch[0].kernel == "double_kernel"


@pytest.mark.parametrize(
    ("kernel", "what"),
    [(unmasked_load_kernel, "load"), (unmasked_store_kernel, "store")],
)
def test_a_lane_outside_a_tensor(kernel, what):
    around_x, around_out = torch.zeros(1000), torch.zeros(1000)
    x, out = around_x[100:200], around_out[100:200]  # nothing breaks but the check
    with pytest.raises(CheckError, match=f"{what}: 28 of 64 lanes out of bounds"):
        launch(kernel, x, out)
    launch(kernel, x[:64], out[:64])


def test_a_lane_between_the_rows_of_a_view():
    x = torch.zeros(4, 40)[:, :30]
    with pytest.raises(CheckError, match="10 of 64 lanes out of bounds"):
        launch(double_kernel, x, torch.empty(120))


def test_a_masked_lane_without_other_is_undefined():
    out = torch.empty(1)
    launch(no_other_kernel, torch.ones(BLOCK), out)
    assert out.item() == BLOCK
    launch(no_other_kernel, torch.ones(BLOCK), out, n=BLOCK - 1)
    assert out.isnan().item()


def test_programs_that_share_a_sum():
    x, out = torch.randn(130), torch.zeros(1)
    with pytest.raises(CheckError, match="race: program 1 reads 4 bytes"):
        launch(running_sum_kernel, x, out)
    launch(running_sum_kernel, x[:BLOCK], out)
    out.zero_()
    report = launch(atomic_sum_kernel, x, out)
    torch.testing.assert_close(out[0], x.sum())
    assert report.atomic_bytes == 12
    assert report.unique_store_bytes == 4


def test_order_matters_where_programs_read_each_other():
    x = torch.randn(130)
    with pytest.raises(CheckError, match="race"):
        launch(neighbour_kernel, x, torch.zeros(130))
    with pytest.raises(CheckError, match="race"):
        launch(neighbour_kernel, x, torch.zeros(130), order="reverse")
    outs = [torch.zeros(130), torch.zeros(130)]
    for out, order in zip(outs, ["forward", "reverse"], strict=True):
        launch(neighbour_kernel, x, out, order=order, racecheck=False)
    assert not torch.equal(*outs)


def test_two_lanes_of_one_store():
    with pytest.raises(CheckError, match="two lanes of one store"):
        launch(same_lane_kernel, torch.randn(BLOCK), torch.empty(BLOCK))


def test_bfloat16_arithmetic_is_refused():
    x = torch.randn(BLOCK).bfloat16()
    with pytest.raises(CheckError, match="bfloat16 operand in multiply"):
        launch(square_kernel, x, torch.empty_like(x))
    with pytest.raises(CheckError, match="bfloat16 operand in a reduction"):
        launch(sum_kernel, x, torch.empty(1))
    launch(square_kernel, x.half(), torch.empty(BLOCK).half())


def product(x, y, precision="ieee", **options):
    out = torch.empty(x.shape)
    with interpreting(report=Report(**options)) as report:
        product_kernel[(1,)](x, y, out, len(x), N=len(x), PRECISION=precision)
    assert report.dot_flops == 2 * len(x) ** 3
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products(dtype):
    x, y = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype)
    want = (x.double() @ y.double()).float()
    torch.testing.assert_close(product(x, y), want)


def test_tf32_cuts_operands_and_leaves_a_bias():
    x = torch.rand(64, 64)
    truth = (x.double() @ x.double()).sum()
    bias = {
        name: (product(x, x, *options).double().sum() / truth - 1).item()
        for name, *options in [("tf32", "tf32"), ("triple", "tf32x3")]
    }
    bias["nearest"] = (
        product(x, x, "tf32", tf32="rne").double().sum() / truth - 1
    ).item()
    bias["exact"] = (product(x, x, "tf32", tf32=None).double().sum() / truth - 1).item()
    assert -2e-3 < bias["tf32"] < -2e-4  # of 2^-11 to 2^-10 lost in each operand
    assert abs(bias["nearest"]) < 2e-5
    assert abs(bias["triple"]) < 1e-6
    assert abs(bias["exact"]) < 1e-6


def test_bfloat16_is_converted_by_value():
    values = torch.tensor([1.0, -1.00390625, 1e-40, float("inf"), float("nan"), 6e4])

    @triton.jit
    def convert_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
        lanes = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + lanes, mask=lanes < n, other=0.0)
        tl.store(out_ptr + lanes, x.to(out_ptr.dtype.element_ty), mask=lanes < n)

    for source in (torch.float32, torch.float16, torch.bfloat16):
        for target in (torch.float32, torch.float16, torch.bfloat16):
            x, out = values.to(source), torch.empty(len(values), dtype=target)
            launch(convert_kernel, x, out)
            torch.testing.assert_close(out, x.to(target), equal_nan=True)


def test_a_sample_of_the_programs_estimates_the_counts():
    x, out = torch.zeros(100 * BLOCK), torch.empty(100 * BLOCK)
    report = launch(double_kernel, x, out, sample=5)
    assert report.programs == 5
    assert report.per_launch[0].programs == 100
    assert report.load_bytes == report.store_bytes == 400 * BLOCK
    with pytest.raises(CheckError, match="64 of 64 lanes out of bounds"):
        launch(double_kernel, x[: 10 * BLOCK], out, n=x.numel(), sample=5)


def compile_double_kernel():
    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    source = ASTSource(double_kernel, signature, {(3,): BLOCK})
    target = GPUTarget("cuda", 90, 32)
    triton.knobs.compilation.always_compile = True
    try:
        return triton.compile(source, target=target).asm["ptx"]
    finally:
        triton.knobs.compilation.always_compile = False


def language():
    return [dict(vars(m)) for m in (tl, tl.core, tl.core.tensor, tl.math, tl.standard)]


def test_everything_is_restored():
    before, globals_before, ptx = language(), set(globals()), compile_double_kernel()
    launch(sum_kernel, torch.randn(BLOCK), torch.empty(1))
    with pytest.raises(CheckError):
        launch(unmasked_load_kernel, torch.zeros(200)[:100], torch.zeros(100))
    assert language() == before
    assert set(globals()) == globals_before
    assert compile_double_kernel() == ptx
    with pytest.raises(RuntimeError, match="Cannot call"):
        double_kernel()
