"""Everything a GPU has to tell in ten minutes: is it right, and how fast is it.

python -m benchmarks.gpu                  all stages; records go to benchmarks/records/
python -m benchmarks.gpu --dry-run        only says what it would do
python -m benchmarks.gpu --stages steps   some of them
python -m benchmarks.gpu --stages suites  whole models, in a run of its own
python -m benchmarks.gpu -n 12            as many processes for the tests
python -m benchmarks.gpu --output FOLDER  records elsewhere
python -m benchmarks.gpu --smoke          without a GPU: tiny models on the CPU

Each stage runs in a process of its own and within its share of the time, so that one
that crashes or hangs costs its own record only. A record is written when its stage
ends; long stages write what they have to FOLDER/<stage>.part as they go, so that
nothing is lost to what ends all of it. Without a GPU: says why, exit status 2. Exit
status 1 where a stage failed. Needs no network.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.suites import WORKERS
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
    # Takes `keep`, which it calls with what it has, and `device` and `size`: on a small
    # one it runs on a CPU.
    is_told: bool = False


STAGES = (
    Stage("tests", 110, "checks.tests", "the tests that are marked gpu"),
    Stage("streams", 25, "checks.streams", "kernels follow the stream of PyTorch"),
    Stage("capture", 25, "checks.capture", "kernels replay in a CUDA graph"),
    Stage("rounding", 15, "checks.rounding", "how TF32 rounds, and what norms lose"),
    Stage("sanitizer", 40, "checks.sanitizer", "compute-sanitizer on small cases"),
    Stage("kernels", 80, "timing.kernels", "every op against its floor and PyTorch"),
    Stage(
        "steps",
        55,
        "steps.steps",
        "W1 to W6: a probed step over a plain one",
        is_told=True,
    ),
    Stage(
        "training",
        220,
        "training.training",
        "GPT-2, Llama, ViT, ResNet-50: every mode, the host, peers",
        is_told=True,
    ),
    Stage(
        "compiled",
        150,
        "compiled.compiled",
        "GPT-2 and ViT under fm.compile, with CUDA graphs too",
        is_alone=True,
        is_told=True,
    ),
    Stage(
        "models",
        240,
        "models.models",
        "GPT-2, Llama, ViT of transformers, ResNets, VGG: right, and the cost",
        is_alone=True,
        is_told=True,
    ),
    Stage(
        "suites",
        560,
        "suites.suites",
        "capture, curvature, spectrum, optim",
        is_alone=True,
    ),
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
    parser.add_argument("-n", "--workers", type=int, help="processes for tests")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny models on the CPU: does it run"
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.workers:
        os.environ[WORKERS] = str(options.workers)
    asked = options.stages.split(",")
    if options.smoke and options.stages == parser.get_default("stages"):
        asked = [s.name for s in STAGES if s.is_told]
    if unknown := set(asked) - {s.name for s in STAGES}:
        known = ", ".join(s.name for s in STAGES)
        parser.error(f"unknown stages {sorted(unknown)}; choose from {known}")
    chosen = [s for s in STAGES if s.name in asked]
    if options.smoke and (large := [s.name for s in chosen if not s.is_told]):
        small = ", ".join(s.name for s in STAGES if s.is_told)
        parser.error(f"stages {large} need a GPU; --smoke runs {small}")
    if options.dry_run:
        for stage in chosen:
            print(f"{stage.name:10} {stage.seconds:4.0f} s  {stage.what}")
        print(f"{'together':10} {sum(s.seconds for s in chosen):4.0f} s at most")
        for stage in STAGES:
            if stage not in chosen:
                print(f"left out: {stage.name} ({stage.seconds:.0f} s), {stage.what}")
        return 0
    if options.child:
        return _child(chosen[0], options.budget, options.child, smoke=options.smoke)
    if not options.smoke and (reason := why_no_gpu()):
        print(f"Nothing to run on: {reason}")
        return 2
    return _all(chosen, options.budget, options.output, smoke=options.smoke)


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


def _all(
    stages: list[Stage], budget: float, output: Path | None, *, smoke: bool
) -> int:
    run = describe_run(torch.get_num_threads())
    if not smoke:
        run["gpu"] = describe_gpu()
    if output is None:
        stamp = run["when"][:16].replace(":", "").replace("T", "-")
        commit = (run["commit"] or "unknown")[:8]
        kind = "smoke" if smoke else "gpu"
        output = HERE / "records" / f"{stamp}-{commit}-{kind}"

    def write(name: str, record: dict) -> None:
        save({"run": run, "stage": name} | record, output / f"{name}.json")

    found = run_stages(stages, budget, output, write, smoke=smoke)
    failed = [name for name, record in found.items() if not record["ok"]]
    print(f"Recorded in {output}")
    if failed:
        print(f"Failed: {', '.join(failed)}")
    return 1 if failed else 0


def run_stages(
    stages: list[Stage],
    budget: float,
    output: Path,
    write: Callable[[str, dict], None] = lambda name, record: None,
    *,
    smoke: bool = False,
) -> dict[str, dict]:
    """Each in its own process; what it found, or how it ended, by name.

    `write` gets each as soon as it has ended.
    """
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget
    found: dict[str, dict] = {}
    for stage in stages:
        seconds = min(stage.seconds, end - time.monotonic())
        print(f"{stage.name}: {stage.what} ({seconds:.0f} s)", flush=True)
        if seconds < 5:
            record = {"ok": False, "error": "no time was left"}
        else:
            start = time.monotonic()
            record = _spawn(stage, seconds, output / f"{stage.name}.part", smoke)
            record["stage_seconds"] = round(time.monotonic() - start, 1)
            print(f"  {'ok' if record['ok'] else 'FAILED'}", flush=True)
        found[stage.name] = record
        write(stage.name, record)
        (output / f"{stage.name}.part").unlink(missing_ok=True)
    return found


def _spawn(stage: Stage, seconds: float, part: Path, smoke: bool) -> dict:
    part.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--stages", stage.name]
    command += ["--smoke"] if smoke else []
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
    """What a stage has written."""
    return json.loads(part.read_text()) if part.exists() else {}


def _child(stage: Stage, seconds: float, part: Path, *, smoke: bool) -> int:
    module, function = stage.module.split(".")
    run = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)

    def keep(found: dict) -> None:
        """In one move, so that no half of it is ever read."""
        fresh = part.with_suffix(".new")
        fresh.write_text(json.dumps(found, indent=1, default=str))
        fresh.replace(part)

    where = {}
    if smoke:
        torch.set_num_threads(1)
        where = {"device": "cpu", "size": "smoke"}
    keep(run(seconds, keep, **where) if stage.is_told else run(seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
