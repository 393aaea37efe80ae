"""The report on kernels sees what is planted, and the package's own are no worse."""

import dataclasses
import functools
import json
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from tools.kernels import report as kernel_report
from tools.kernels.cases import Tensors
from tools.kernels.compile import code_digest
from tools.kernels.occupancy import MACHINES, occupancy
from tools.kernels.rows import readable, regressions, table, triton_rows


@triton.jit
def _square_sums(x_ptr, out_ptr, rows, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """out[c] = sum over rows of x[r, c]^2, which keeps BLOCK x COLUMNS in registers."""
    r, c = tl.arange(0, BLOCK)[:, None], tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for first in range(0, rows, BLOCK):
        x = tl.load(x_ptr + (first + r) * COLUMNS + c, mask=first + r < rows, other=0.0)
        total += x * x
    tl.store(out_ptr + tl.arange(0, COLUMNS), tl.sum(total, axis=0))


@triton.jit
def _scale(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, 2 * tl.load(x_ptr + i, mask=i < size), mask=i < size)


@triton.jit
def _gram(x_ptr, out_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i[:, None] * SIZE + i[None, :])
    product = tl.dot(x, tl.trans(x), input_precision=PRECISION)
    tl.store(out_ptr + i[:, None] * SIZE + i[None, :], product)


class _Planted(NamedTuple):
    """A case of a kernel that is in no table."""

    kernel: object
    shape: tuple[int, ...]
    constants: dict
    grid: int = 1
    label: str = "planted"
    dtype: torch.dtype = torch.float32

    def launch(self, new: Tensors) -> None:
        x = new.normal(*self.shape)
        sizes = () if self.kernel is _gram else (self.shape[0],)
        self.kernel[(self.grid,)](x, torch.empty_like(x), *sizes, **self.constants)


def _row(*planted, architecture="sm_90a", **options):
    (row,) = triton_rows([_Planted(*planted, **options)], architecture)
    return row


@functools.cache
def _squares(warps):
    constants = {"BLOCK": 128, "COLUMNS": 64, "num_warps": warps}
    return _row(_square_sums, (4096, 64), constants, label=f"{warps} warps")


@functools.cache
def _scaled(size):
    return _row(_scale, (size,), {"BLOCK": 1024}, grid=-(-size // 1024))


@pytest.mark.parametrize("is_known", [False, True])
def test_a_kernel_that_spills_fails(tmp_path, is_known):
    """Also one that spilled before."""
    good, bad = _squares(4), _squares(1)
    assert good.spills == 0
    assert bad.spills > 0 and bad.registers == 255
    worse, notes = _check([good, bad], [good, bad] if is_known else [good], tmp_path)
    assert len(worse) == 1 and f"spills registers ({bad.spills} " in worse[0]
    assert bool(notes) != is_known


def test_no_kernel_of_the_baseline_spills():
    rows = json.loads(kernel_report.BASELINE.read_text())["rows"]
    assert len(rows) > 50
    assert not [key for key, row in rows.items() if row["spills"]]


def test_loops_are_seen():
    row = _squares(4)
    assert 0 < row.loop < row.instructions
    assert _scaled(1 << 20).loop == 0


def test_narrow_loads_are_a_regression():
    """A kernel told of no alignment loads an element a thread."""
    wide, narrow = _scaled(1 << 20), _scaled((1 << 20) + 1)
    assert wide.blocks == 1024 and narrow.blocks == 1025
    assert wide.wide_loads and not wide.narrow_loads
    assert narrow.narrow_loads and not narrow.wide_loads
    sentences = list(regressions(wide.as_dict(), narrow, same_compiler=False))
    assert any("lost its 16-byte loads" in s for s in sentences)


@pytest.mark.parametrize("architecture", MACHINES)
def test_lost_tensor_cores_are_a_regression(architecture):
    constants = {"SIZE": 64, "num_warps": 4}
    rows = {
        precision: _row(
            _gram,
            (64, 64),
            constants | {"PRECISION": precision},
            architecture=architecture,
        )
        for precision in ("tf32", "ieee")
    }
    assert rows["tf32"].tensor and not rows["ieee"].tensor
    sentences = list(
        regressions(rows["tf32"].as_dict(), rows["ieee"], same_compiler=True)
    )
    assert any("lost its tensor-core" in s for s in sentences)


def test_lower_occupancy_is_compared_within_one_compiler():
    row = _squares(4)
    better = row.as_dict() | {"resident": row.resident + 1}
    (sentence,) = regressions(better, row, same_compiler=True)
    assert "lower occupancy" in sentence
    assert not list(regressions(better, row, same_compiler=False))


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks", "limit"),
    [
        (32, 0, 8, 8, "registers"),
        (64, 0, 8, 4, "registers"),
        (255, 0, 8, 1, "registers"),
        (16, 0, 1, 32, "blocks"),
        (16, 50_000, 4, 4, "shared"),
        (16, 0, 4, 16, "warps"),
    ],
)
def test_occupancy(registers, shared, warps, blocks, limit):
    """By hand: 64 registers of 256 threads are a quarter of 65536, and so on."""
    found = occupancy(MACHINES["sm_90a"], registers, shared, warps)
    assert found.blocks == blocks
    assert found.share == blocks * warps / 64
    if found.limit != limit:
        ties = {"registers", "warps"}
        assert {found.limit, limit} <= ties


def test_readable_names():
    assert readable("_ZN10fastminima4cuda8dot_rowsIfLi4EEEvPKT_") == "dot_rows<f, 4>"
    assert readable("_ZN10fastminima4cuda12add_partialsEPKdlPdij") == "add_partials"
    assert readable("_gram_kernel") == "_gram_kernel"
    nested = "_ZN10fastminima4cuda9step_dotsIfNS0_5TokenELi4EEEvPKT_"
    assert readable(nested) == nested


def _check(rows, baseline_rows, tmp_path, version=None):
    path = tmp_path / "baseline.json"
    path.write_text(kernel_report.as_json(baseline_rows))
    baseline = json.loads(path.read_text())
    return kernel_report.check(
        rows, baseline | ({"triton": version} if version else {})
    )


def test_check_compares_with_what_was_written(tmp_path):
    row = _squares(4)
    assert _check([row], [row], tmp_path) == ([], [])
    better = dataclasses.replace(row, wide_loads=8, tensor=4)
    worse, _ = _check([dataclasses.replace(row, wide_loads=0)], [better], tmp_path)
    assert len(worse) == 2


def test_two_rows_of_one_name_are_refused():
    """One would hide the other in the baseline."""
    row = _squares(4)
    with pytest.raises(ValueError, match="more than once"):
        kernel_report.as_json([row, dataclasses.replace(row, spills=3)])


def test_check_says_what_it_cannot_compare(tmp_path):
    row = _squares(4)
    held_more = dataclasses.replace(row, resident=row.resident + 1)
    worse, notes = _check([row], [held_more], tmp_path, version="3.0.0")
    assert not worse and "Triton 3.0.0" in notes[0]


def test_table_has_a_line_for_each_row():
    lines = table([_squares(4), _scaled(1024)]).splitlines()
    assert len(lines) == 3 and "_square_sums" in lines[1] and "_scale" in lines[2]


@pytest.mark.slow
def test_the_kernels_of_the_package_are_no_worse_than_the_baseline(capsys):
    assert kernel_report.main(["--check"]) == 0, capsys.readouterr().out


def _kept(row, **changes):
    """A row as the baseline holds it."""
    values = dataclasses.asdict(row) | changes
    names = ("case", "kernel", "architecture")
    return {row.key: {k: v for k, v in values.items() if k not in names}}


def test_counts_of_the_same_code_are_taken_from_the_baseline(monkeypatch, tmp_path):
    """Of another case too, and blocks are the launch's own."""
    rows = [(1 << 20, 1 << 10), (1 << 21, 1 << 11)]
    case, larger = (
        _Planted(_scale, (size,), {"BLOCK": 1024}, grid=grid) for size, grid in rows
    )
    (row,) = triton_rows([case], "sm_90a")

    def failing(*_):
        raise AssertionError("it was compiled")

    monkeypatch.setattr("tools.kernels.rows.disassemble", failing)
    monkeypatch.setattr("tools.kernels.compile._compiled", failing)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # there is nothing in it
    _scale.device_caches.clear()
    for again, blocks in ((case, 1 << 10), (larger, 1 << 11)):
        (known,) = triton_rows([again], "sm_90a", _kept(row))
        assert known == dataclasses.replace(row, blocks=blocks)


@pytest.mark.parametrize("other", [{"BLOCK": 2048}, {"BLOCK": 1024, "num_warps": 8}])
def test_other_code_is_looked_at_whatever_the_baseline_says(other):
    (row,) = triton_rows([_Planted(_scale, (1 << 20,), {"BLOCK": 1024})], "sm_90a")
    case = _Planted(_scale, (1 << 20,), other)
    (now,) = triton_rows([case], "sm_90a", _kept(row, instructions=1))
    assert now.code != row.code
    assert now.instructions > 1


def test_code_of_another_architecture_is_looked_at():
    case = _Planted(_scale, (1 << 20,), {"BLOCK": 1024})
    (row,) = triton_rows([case], "sm_80")
    (now,) = triton_rows([case], "sm_90a", _kept(row, instructions=1))
    assert now.code == row.code
    assert now.instructions > 1


def test_a_digest_is_of_code_and_of_options():
    code = (
        "#loc{0} = loc(callsite(#loc1 at #loc{0}))\n"
        'tt.func public @k(%x: !tt.ptr<f32> loc("x"(#loc)), %n: i{1} loc(#loc{0})) {{\n'
        "  tt.return loc(unknown)\n}} loc(#loc)"
    )
    four, eight = (SimpleNamespace(num_warps=warps) for warps in (4, 8))
    first = code_digest(code.format(3, 32), four)
    assert code_digest(code.format(52, 32), four) == first
    assert code_digest(code.format(3, 64), four) != first
    assert code_digest(code.format(3, 32), eight) != first
