"""Everything a GPU has to tell in ten minutes: is it right, and how fast is it.

python -m benchmarks.gpu                  all stages; records go to benchmarks/records/
python -m benchmarks.gpu --dry-run        only says what it would do
python -m benchmarks.gpu --stages steps   some of them
python -m benchmarks.gpu --stages suites  whole models, in a run of its own
python -m benchmarks.gpu --output FOLDER  records elsewhere

Each stage runs in a process of its own and within its share of the time, so that one
that crashes or hangs costs its own record only. Without a GPU: says why, exit status 2.
Exit status 1 where a stage failed. Needs no network.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.records import HERE, describe_run, save

__all__ = ["STAGES", "Stage", "main", "run_stages", "why_no_gpu"]

ROOT = HERE.parent
TOTAL = 570.0  # seconds


@dataclass(frozen=True)
class Stage:
    """A function `run(seconds) -> dict` of a module, and the time it may take.

    Its dict becomes the record; `"ok": False` in it means that the stage failed.
    """

    name: str
    seconds: float
    module: str
    what: str
    is_alone: bool = False  # runs where it is asked for: it takes all the time


STAGES = (
    Stage("tests", 150, "checks.tests", "the tests that are marked gpu"),
    Stage("streams", 30, "checks.streams", "kernels follow the stream of PyTorch"),
    Stage("capture", 30, "checks.capture", "kernels replay in a CUDA graph"),
    Stage("rounding", 20, "checks.rounding", "how TF32 rounds, and what norms lose"),
    Stage("sanitizer", 60, "checks.sanitizer", "compute-sanitizer on small cases"),
    Stage("kernels", 160, "timing.kernels", "every op against its floor and PyTorch"),
    Stage("steps", 120, "steps.steps", "W1 to W5: a probed step over a plain one"),
    Stage(
        "models",
        240,
        "models.models",
        "GPT-2, Llama, ViT, ResNet-50, VGG: right, and the cost",
        True,
    ),
    Stage("suites", 560, "suites.suites", "capture, curvature, spectrum, optim", True),
)
DEFAULT = tuple(s.name for s in STAGES if not s.is_alone)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--stages", default=",".join(DEFAULT))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--budget", type=float, default=TOTAL, help="seconds in all")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    asked = options.stages.split(",")
    if unknown := set(asked) - {s.name for s in STAGES}:
        known = ", ".join(s.name for s in STAGES)
        parser.error(f"unknown stages {sorted(unknown)}; choose from {known}")
    chosen = [s for s in STAGES if s.name in asked]
    if options.dry_run:
        for stage in chosen:
            print(f"{stage.name:10} {stage.seconds:4.0f} s  {stage.what}")
        print(f"{'together':10} {sum(s.seconds for s in chosen):4.0f} s at most")
        for stage in STAGES:
            if stage not in chosen:
                print(f"left out: {stage.name} ({stage.seconds:.0f} s), {stage.what}")
        return 0
    if options.child:
        return _child(chosen[0], options.budget, options.child)
    if reason := why_no_gpu():
        print(f"Nothing to run on: {reason}")
        return 2
    return _all(chosen, options.budget, options.output)


def why_no_gpu() -> str | None:
    """What is missing; None where there is a GPU."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} was built without CUDA."
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device (driver or GPU missing)."
    return None


def describe_gpu() -> dict:
    """The device and what its numbers depend on, beside `describe_run`."""
    properties = torch.cuda.get_device_properties(0)
    smi = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit"]
    try:
        told = subprocess.run(
            [*smi, "--format=csv,noheader"], capture_output=True, text=True, check=False
        ).stdout.strip()
    except FileNotFoundError:
        told = "nvidia-smi not found"
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver, clocks, power": told,
    }


def _all(stages: list[Stage], budget: float, output: Path | None) -> int:
    run = describe_run(torch.get_num_threads()) | {"gpu": describe_gpu()}
    if output is None:
        stamp = run["when"][:16].replace(":", "").replace("T", "-")
        commit = (run["commit"] or "unknown")[:8]
        output = HERE / "records" / f"{stamp}-{commit}-gpu"
    found = run_stages(stages, budget, output)
    for name, record in found.items():
        save({"run": run, "stage": name} | record, output / f"{name}.json")
    failed = [name for name, record in found.items() if not record["ok"]]
    print(f"Recorded in {output}")
    if failed:
        print(f"Failed: {', '.join(failed)}")
    return 1 if failed else 0


def run_stages(stages: list[Stage], budget: float, output: Path) -> dict[str, dict]:
    """Each in its own process; what it found, or how it ended, by name."""
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget
    found: dict[str, dict] = {}
    for stage in stages:
        seconds = min(stage.seconds, end - time.monotonic())
        print(f"{stage.name}: {stage.what} ({seconds:.0f} s)", flush=True)
        if seconds < 5:
            found[stage.name] = {"ok": False, "error": "no time was left"}
            continue
        start = time.monotonic()
        found[stage.name] = _spawn(stage, seconds, output / f"{stage.name}.part")
        found[stage.name]["stage_seconds"] = round(time.monotonic() - start, 1)
        print(f"  {'ok' if found[stage.name]['ok'] else 'FAILED'}", flush=True)
    return found


def _spawn(stage: Stage, seconds: float, part: Path) -> dict:
    part.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--stages", stage.name]
    try:
        done = subprocess.run(
            [*command, "--budget", str(0.85 * seconds), "--child", str(part)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            env=os.environ | {"PYTHONFAULTHANDLER": "1"},
        )
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode() if isinstance(late.stdout, bytes) else ""
        error = f"took more than {seconds:.0f} s"
        return _read(part) | {"ok": False, "error": error, "said": said[-2000:]}
    if done.returncode or not part.exists():
        error = f"ended with status {done.returncode}"
        said = (done.stdout + done.stderr)[-4000:]
        return _read(part) | {"ok": False, "error": error, "said": said}
    return {"ok": True} | _read(part)


def _read(part: Path) -> dict:
    """What a stage has written, and no file left."""
    if not part.exists():
        return {}
    found = json.loads(part.read_text())
    part.unlink()
    return found


def _child(stage: Stage, seconds: float, part: Path) -> int:
    module, function = stage.module.split(".")
    run = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
    part.write_text(json.dumps(run(seconds), indent=1, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
