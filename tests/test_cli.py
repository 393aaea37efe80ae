"""`python -m fastminima` reports what this machine has and what would run on it."""

import os
import re
import subprocess
import sys

import pytest
import torch

from fastminima import __version__, _native
from fastminima.cli import machine as report
from fastminima.cli import main
from fastminima.ops.table import REGISTRY, Op


@pytest.fixture
def lines(capsys):
    assert main([]) == 0
    return capsys.readouterr().out.splitlines()


def line_of(lines, start):
    (found,) = (line for line in lines if line.split()[:1] == [start])
    return found


def test_versions_and_threads(lines):
    for name, value in (
        ("fastminima", __version__),
        ("torch", torch.__version__),
        ("threads", str(torch.get_num_threads())),
    ):
        assert line_of(lines, name).split()[1] == value


def test_instruction_set_or_the_reason_for_none(lines):
    isas = _native.available_isas()
    wanted = isas[0] if isas else _native.missing_reason
    assert wanted in line_of(lines, "native")


def test_cuda_architectures_or_the_reason_for_none(lines):
    wanted = _native.cuda_missing_reason() or ", ".join(_native.cuda_architectures())
    assert wanted and wanted in line_of(lines, "cuda")


def test_cuda_kernels_without_a_device(monkeypatch):
    monkeypatch.setattr(_native, "cuda_missing_reason", lambda: None)
    monkeypatch.setattr(_native, "cuda_architectures", lambda: ("sm_80", "sm_90a"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert report._cuda_line() == "built for sm_80, sm_90a; no CUDA device here"


def test_every_op_with_the_implementation_that_runs(lines):
    listed = [line for line in lines if line.startswith("  ")]
    names = {line.split()[0] for line in listed}
    assert names >= set(REGISTRY)
    for name in ("direct_sq_norms", "sequence_dots"):
        device, used = line_of(listed, name).split()[1:3]
        assert device == "cpu"
        assert used == REGISTRY[name].backends("cpu", torch.float32)[0]


@pytest.fixture
def op():
    yield Op("cli_test", lambda x: x)
    del REGISTRY["cli_test"]


def others(op):
    found = report._others(op, "cpu").items()
    return " ; ".join(f"{', '.join(names)}: {reason}" for reason, names in found)


def test_why_others_do_not_run(op, monkeypatch):
    monkeypatch.setattr(_native, "cuda_missing_reason", lambda: None)
    op.add("quick", abs, devices=("cpu",), dtypes=(torch.float32,))
    op.add("quicker", abs, devices=("cpu",), dtypes=(torch.float32,))
    op.add("wide", abs, devices=("cpu",), dtypes=(torch.float64,))
    op.add("triton", abs, devices=("cuda",), dtypes=(torch.float32,))
    op.add("slow", abs, devices=("cpu",), dtypes=(torch.float32,), preferred=False)
    text = others(op)
    assert "reference: slower than quicker" in text
    assert re.search(r"quick, slow: not preferred to quicker", text)
    assert "wide: not for torch.float32" in text
    assert "triton: for cuda tensors" in text
    assert "cuda: no such kernel" in text


def test_an_implementation_of_several_dtypes_is_named_once(op, monkeypatch):
    """Kernels that are registered dtype by dtype, as those for GPUs are."""
    monkeypatch.setattr(_native, "cuda_missing_reason", lambda: None)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        op.add("triton", abs, devices=("cuda",), dtypes=(dtype,))
        op.add("quick", abs, devices=("cpu",), dtypes=(dtype,))
    text = others(op)
    assert re.findall("triton", text) == ["triton"]
    assert "quick: " not in text  # it is what runs


def test_every_implementation_is_named_once_a_line(lines):
    for line in (line for line in lines if line.startswith("  ")):
        named = re.findall(r"([\w-]+)(?=[,:] )", line)
        names = [name for name in named if name in ("triton", "cuda", "reference")]
        assert len(names) == len(set(names)), line


def test_missing_cuda_kernels_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(_native, "cuda_missing_reason", lambda: "not built: no nvcc")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert re.search(r"no: not built: no nvcc; the GPU here runs", report._cuda_line())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert report._cuda_line() == "no: not built: no nvcc"


def test_a_reader_that_has_seen_enough():
    """`python -m fastminima | head -1` ends without a traceback, with status 0."""
    command = f"{sys.executable} -m fastminima | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stdout.startswith("fastminima")
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_a_pipe_closed_from_the_start():
    """The reader is gone before the first line."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "fastminima"],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_missing_extension_is_the_reason(op, monkeypatch):
    monkeypatch.setattr(_native, "missing_reason", "not built: no g++")
    monkeypatch.setattr(_native, "cuda_missing_reason", lambda: None)
    assert "native: not built: no g++" in others(op)


def test_missing_cuda_kernels_are_the_reason(op, monkeypatch):
    monkeypatch.setattr(_native, "cuda_missing_reason", lambda: "not built: no nvcc")
    assert "cuda: not built: no nvcc" in others(op)


def test_instruction_set_that_is_not_here(op, monkeypatch):
    op.add("native", abs, devices=("cpu",), dtypes=(torch.float32,))
    monkeypatch.setattr(_native, "missing_reason", None)
    monkeypatch.setattr(_native, "available_isas", lambda: ("avx2", "generic"))
    assert "native-avx512: not in this build or not on this processor" in others(op)
