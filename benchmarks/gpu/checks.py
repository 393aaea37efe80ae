"""Stages that ask whether kernels are right on a GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.gpu.suites import reported, workers
from benchmarks.records import HERE
from tools.kernels.cases import Case, Tensors, cases

__all__ = ["capture", "rounding", "sanitizer", "small", "streams", "tests"]

ROOT = HERE.parent
DEVICE = "cuda"


def tests(seconds: float) -> dict:
    """The tests that are marked gpu, in as many processes as `suites.workers` says."""

    def words(report: Path) -> list[str]:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests"]
        command += ["-p", "no:cacheprovider", f"--junitxml={report}"]
        return [*command, "-n", str(workers())] if workers() > 1 else command

    return reported(words, seconds)


def _kernels() -> Iterator[tuple[Case, str]]:
    """The first size of each op in each dtype, with each backend that has kernels."""
    seen = set()
    for backend in ("triton", "cuda"):
        for case in cases(backend):
            key = backend, case.op.name, case.dtype
            if key not in seen:
                seen.add(key)
                yield case, backend


def _copies(values: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, values)


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _outcome(run: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """What comes back, and the arguments: some ops write into them."""
    return run(*arguments), arguments


def _same(one: Any, other: Any) -> bool:
    """Bit by bit: kernels are deterministic."""
    pairs = zip(_tensors(one), _tensors(other), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def _each(check: Callable[[Case, str], str]) -> dict:
    """Checks every kernel; an error of one is its verdict."""
    verdicts = {}
    for case, backend in _kernels():
        try:
            verdicts[f"{case.label} {backend}"] = check(case, backend)
        except (RuntimeError, TypeError, ValueError, LookupError) as error:
            verdicts[f"{case.label} {backend}"] = f"{type(error).__name__}: {error}"
    wrong = {label: said for label, said in verdicts.items() if said != "same"}
    return {
        "ok": not wrong and bool(verdicts),
        "checked": len(verdicts),
        "wrong": wrong,
    }


def streams(seconds: float) -> dict:
    """A side stream gives what the default stream gives.

    The inputs are written on the side stream just before, after a wait: a kernel that
    ran on another stream would see what was there earlier.
    """
    side = torch.cuda.Stream()

    def check(case: Case, backend: str) -> str:
        run = case.op.on(backend, "cuda", case.key)
        truth = case.make(Tensors(DEVICE, case.dtype))
        want = _outcome(run, _copies(truth))
        stale = _copies(truth)
        for x in _tensors(stale):
            x.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # cycles, some 10 ms
            for x, y in zip(_tensors(stale), _tensors(truth), strict=True):
                x.copy_(y)
            got = _outcome(run, stale)
        side.synchronize()
        return "same" if _same(want, got) else "differs from the default stream"

    return _each(check)


def capture(seconds: float) -> dict:
    """A graph replayed on new data gives what a call gives."""

    def check(case: Case, backend: str) -> str:
        run = case.op.on(backend, "cuda", case.key)
        truth = case.make(Tensors(DEVICE, case.dtype))
        static = _copies(truth)
        want = _outcome(run, _copies(truth))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = _outcome(run, static)
        for x, y in zip(_tensors(static), _tensors(truth), strict=True):
            x.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        return "same" if _same(want, got) else "differs from a call"

    return _each(check)


def rounding(seconds: float) -> dict:
    """Relative error of squared norms of float32 tensors, against float64.

    `bias` is its mean over samples, with a sign; truncated TF32 operands would show as
    about -1.4e-3, rounded ones as some 1e-5, float32 arithmetic as some 1e-7. `tf32`
    is a product of PyTorch in TF32, for comparison.
    """
    torch.manual_seed(0)
    a, g = (torch.randn(64, 256, 512, device=DEVICE) for _ in range(2))
    truth = torch.bmm(g.double().mT, a.double()).square().sum(dim=(1, 2))
    found = {}
    for case in cases("triton"):
        if case.op.name in ("gram_sq_norms", "direct_sq_norms"):
            norms = case.op.on("triton", "cuda", torch.float32)(a, g)
            found[case.op.name] = _errors(norms, truth)
    torch.backends.cuda.matmul.allow_tf32 = True
    products = torch.bmm(a, a.mT) * torch.bmm(g, g.mT)
    torch.backends.cuda.matmul.allow_tf32 = False
    found["tf32 by PyTorch"] = _errors(products.sum(dim=(1, 2)), truth)
    ours = [e["bias"] for name, e in found.items() if "tf32" not in name]
    return {"ok": bool(ours) and all(abs(b) < 1e-5 for b in ours), "errors": found}


def _errors(norms: Tensor, truth: Tensor) -> dict:
    relative = (norms.double() - truth) / truth
    return {"bias": relative.mean().item(), "worst": relative.abs().max().item()}


def sanitizer(seconds: float) -> dict:
    """compute-sanitizer's memcheck over `small`, in a process of its own."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"ok": True, "skipped": "compute-sanitizer was not found"}
    run = "from benchmarks.gpu.checks import small; small()"
    done = subprocess.run(
        [
            tool,
            "--tool",
            "memcheck",
            "--error-exitcode",
            "9",
            sys.executable,
            "-c",
            run,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    return {
        "ok": done.returncode == 0,
        "status": done.returncode,
        "said": (done.stdout + done.stderr)[-6000:],
    }


def small() -> None:
    """Every kernel once, no dimension longer than 67: past the edges of tiles of 64."""
    for case, backend in _kernels():
        run = case.op.on(backend, "cuda", case.key)
        run(*case.make(_Capped(DEVICE, case.dtype)))
    torch.cuda.synchronize()


class _Capped(Tensors):
    """Equal dimensions stay equal, so that the arguments still belong together."""

    most = 67

    def normal(self, *shape: int) -> Tensor:
        return super().normal(*self._cap(shape))

    def wide(self, *shape: int) -> Tensor:
        return super().wide(*self._cap(shape))

    def integers(self, high: int, *shape: int) -> Tensor:
        return super().integers(min(high, self.most), *self._cap(shape))

    def _cap(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(min(n, self.most) for n in shape)
