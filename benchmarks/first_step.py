"""The first probed step of a new model beside plain steps: time, and peak memory.

The first step of a graph measures whose rows are whose: a plain pass, and one for each
digit of a sample's number, without weight gradients. Run as a module this file is the
child that notes a peak: `python -m benchmarks.first_step W5 first`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastminima as fm
from benchmarks.internals import digits_of
from benchmarks.memory import MIB, ROOT, _reset_peak, _return_freed_memory, peak
from benchmarks.workloads import WORKLOADS, build

__all__ = ["NAMES", "first_step"]

GPT2 = "GPT-2"  # 4 of the 12 layers of 124M, with the whole vocabulary
NAMES = (*WORKLOADS, GPT2)
_BATCH, _TIME, _VOCABULARY = 4, 256, 50257


def first_step(name: str, rounds: int) -> dict:
    """Seconds and MiB of a first step, over those of a plain one.

    Plain steps and first ones (a new probe each) take turns. The aim is 2 + digits
    plain steps, 4 at most, and 1.3 of the memory.
    """
    model, losses, batch = _model(name)

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        losses().mean().backward()

    def first() -> None:
        model.zero_grad(set_to_none=True)
        fm.GradientProbe(model).backward(losses())

    plain()
    first()
    seconds = [(_seconds(plain), _seconds(first)) for _ in range(rounds)]
    ratios = sorted(b / a for a, b in seconds)
    peaks = [_peak_of(name, step) for step in ("plain", "first")]
    return {
        "digits": digits_of(batch),
        "plain_seconds": statistics.median(a for a, _ in seconds),
        "ratio": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
        "plain_peak_mib": peaks[0],
        "first_peak_mib": peaks[1],
    }


def _model(name: str) -> tuple[nn.Module, Callable[[], Tensor], int]:
    if name != GPT2:
        workload = build(name)
        return workload.model, workload.losses, workload.batch_size
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = GPT2LMHeadModel(config)
    ids = torch.randint(_VOCABULARY, (_BATCH, _TIME))

    def losses() -> Tensor:
        logits = model(ids).logits[:, :-1]
        tokens = nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        return tokens.view(_BATCH, -1).mean(1)

    return model, losses, _BATCH


def _seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _peak_of(name: str, step: str) -> float:
    """MiB by which one step's peak passes what model and data take."""
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-m", "benchmarks.first_step", name, step, threads]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{name}, {step}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _child(name: str, step: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    model, losses, _ = _model(name)
    # What PyTorch and the kernels set up once is not counted.
    small = nn.Linear(4, 4)
    fm.GradientProbe(small).backward(small(torch.randn(4, 4)).square().sum(1))
    with torch.no_grad():
        losses()
    _return_freed_memory()
    _reset_peak()
    before = peak()
    if step == "plain":
        losses().mean().backward()
    else:
        fm.GradientProbe(model).backward(losses())
    print(json.dumps((peak() - before) / MIB))


if __name__ == "__main__":
    _child(*sys.argv[1:])
