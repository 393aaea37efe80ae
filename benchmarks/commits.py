"""A probed step of two versions of the package, side by side: did a change cost speed?

git worktree add ../before <commit>        then build there, or copy its module
python -m benchmarks.commits ../before .           W1, W1L and a GPT-2, some two minutes
python -m benchmarks.commits ../before . --cases W2,W4 --rounds 40
python -m benchmarks.commits ../before . --cases W1L --measure second_moments

Each version runs in a process of its own, with one thread; they take turns, round by
round. Printed is the CPU time of a probed step beside a plain one, and what the probe
costs for each parameter of a GPT-2 so narrow that nothing but Python counts (12 layers,
width 32). `--threads 2` takes the time of the clock instead. The record is written to
benchmarks/records, or as `--record` says.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

CASES = ("W1", "W1L", "gpt2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trees", nargs="*", type=Path, help="clones, each of a version")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--mode", default="observe")
    parser.add_argument("--measure", default="norms")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", type=Path, help="a file, or - for none")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.mode, options.measure, options.threads)
        return
    workers = {str(tree): _start(tree.resolve(), options) for tree in options.trees}
    found_all: dict[str, dict] = {}
    for case in options.cases.split(","):
        rounds: dict[str, list[tuple[float, float]]] = {tree: [] for tree in workers}
        for _ in range(options.rounds):
            for tree, worker in workers.items():
                rounds[tree].append(_ask(worker, case))
        found_all[case] = {_commit(tree): found for tree, found in rounds.items()}
        for tree, found in rounds.items():
            print(f"{case:5} {Path(tree).resolve().name:16} {_summary(case, found)}")
    _keep(options, found_all)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()


def _commit(tree: str) -> str:
    said = subprocess.run(
        ["git", "-C", tree, "describe", "--always", "--dirty", "--abbrev=8"],
        capture_output=True,
        text=True,
    )
    return said.stdout.strip() or tree


def _keep(options: argparse.Namespace, rounds: dict[str, dict]) -> None:
    """Write all rounds, in seconds of a plain and a probed step."""
    if str(options.record) == "-":
        return
    from benchmarks.records import describe_run, save

    settings = {name: getattr(options, name) for name in ("mode", "measure", "rounds")}
    content = {"run": describe_run(options.threads), **settings, "cases": rounds}
    print("record:", save(content, options.record, suffix="-commits"))


def _start(tree: Path, options: argparse.Namespace) -> subprocess.Popen:
    """A process with the package of one clone, and the benchmarks of this one."""
    here = Path(__file__).resolve().parents[1]
    threads = str(options.threads)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "FASTMINIMA_TREE": str(tree),
    }
    passed = ["--mode", options.mode, "--measure", options.measure]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "benchmarks.commits", "--serve"),
            *(*passed, "--threads", threads),
        ],
        cwd=here,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _ask(worker: subprocess.Popen, case: str) -> tuple[float, float]:
    worker.stdin.write(case + "\n")
    worker.stdin.flush()
    plain, probed = worker.stdout.readline().split()
    return float(plain), float(probed)


def _summary(case: str, rounds: list[tuple[float, float]]) -> str:
    ratios = sorted(probed / plain for plain, probed in rounds)
    quarter = len(ratios) // 4
    low, high = ratios[quarter], ratios[-1 - quarter]
    plain = 1e3 * statistics.median(plain for plain, _ in rounds)
    text = f"plain {plain:.3f} ms, ratio {statistics.median(ratios):.3f}"
    text += f" ({low:.3f}-{high:.3f})"
    if case == "gpt2":
        each = [1e6 * (probed - plain) / 148 for plain, probed in rounds]
        text += f", {statistics.median(each):.1f} us a parameter"
    return text


def serve(mode: str, measure: str, threads: int) -> None:
    """Answer each case named with the seconds of a plain and a probed step.

    Of the CPU on one thread, of the clock on more.
    """
    clock = time.process_time_ns if threads == 1 else time.perf_counter_ns
    sys.path.insert(0, os.environ["FASTMINIMA_TREE"])
    warnings.filterwarnings("ignore")
    steps: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {}
    for line in sys.stdin:
        case = line.strip()
        if case not in steps:
            steps[case] = _steps(case, mode, measure, threads)
            for step in steps[case]:
                for _ in range(15):  # the structure is measured anew after ten
                    step()
        repeats = {"W1": 20, "W1L": 8, "gpt2": 4}.get(case, 2)
        print(*(_seconds(step, repeats, clock) for step in steps[case]), flush=True)


def _seconds(step: Callable[[], None], repeats: int, clock: Callable[[], int]) -> float:
    start = clock()
    for _ in range(repeats):
        step()
    return (clock() - start) / 1e9 / repeats


def _steps(
    case: str, mode: str, measure: str, threads: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    import torch

    import fastminima as fm

    assert str(Path(fm.__file__).parents[1]) == os.environ["FASTMINIMA_TREE"]
    torch.set_num_threads(threads)
    model, losses = _model(case)
    probe = fm.GradientProbe(model, measure=measure, mode=mode, check_every=10**9)

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        losses().mean().backward()

    def probed() -> None:
        model.zero_grad(set_to_none=True)
        probe.backward(losses())

    return plain, probed


def _model(case: str):
    from benchmarks.models import narrow_gpt2
    from benchmarks.workloads import build

    if case == "gpt2":
        return narrow_gpt2(width=32)
    workload = build(case)
    return workload.model, workload.losses


if __name__ == "__main__":
    main()
