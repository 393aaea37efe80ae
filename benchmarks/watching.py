"""What `fm.monitor.watch` costs on W5: rows by layer, samples, histograms, spikes.

python -m benchmarks.watching                  some minutes on one core
python -m benchmarks.watching --rounds 10      fewer

CPU time of the thread, so that other programs count little; steps of all kinds take
turns.

- steps: each kind's step beside the plain and the probed one; ratios of neighbours.
- parts: what comes on top of a probed step, by itself, where a difference of whole
  steps would drown in noise: the row with its files, norms of the mean by parameter,
  and what a step costs that `every` leaves out.
- every=10: from these, (watched - plain) / 10 plus what a step costs that is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import fastminima as fm
from benchmarks.records import describe_run, save
from benchmarks.workloads import Workload, build
from fastminima.capture.session.held import each_square, sum_of_squares

# Options of the probe, by name.
PROBES = {
    "observe": {},
    "fused": {"mode": "fused"},
    "sample=4": {"sample": 4},  # of 16
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, help="where the record goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    run = describe_run(1)
    with tempfile.TemporaryDirectory() as folder:
        record = measure(options.rounds, Path(folder))
    path = save({"run": run, **record}, options.output)
    print(json.dumps(record, indent=1))
    print(f"Recorded in {path}")


def measure(rounds: int, folder: Path) -> dict:
    """Everything on W5."""
    plain = build("W5")
    kinds: dict[str, Callable[[], object]] = {"plain": lambda: plain_step(plain)}
    watches = {}
    for name, options in PROBES.items():
        probed, watched = plain.fresh(), plain.fresh()
        probe = fm.GradientProbe(probed.model, **options)
        kinds[f"probed, {name}"] = lambda w=probed, p=probe: probed_step(w, p)
        watch = watching(watched, folder / name, **options)
        kinds[f"watched, {name}"] = lambda w=watched, p=watch: probed_step(w, p)
        watches[name] = watched, watch
    for _ in range(4):
        for step in kinds.values():
            step()
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, step in kinds.items():
            times[kind].append(seconds(step))
    usual = {kind: statistics.median(found) for kind, found in times.items()}
    found = {"seconds": usual}
    for name, (_, watch) in watches.items():
        found[f"watched / probed, {name}"] = quartiles(
            times[f"watched, {name}"], times[f"probed, {name}"]
        )
        found[f"watched / plain, {name}"] = quartiles(
            times[f"watched, {name}"], times["plain"]
        )
        watch.close()
    parts = found["parts"] = parts_of(*watches["observe"], folder)
    for name in watches:
        extra = usual[f"watched, {name}"] - usual["plain"]
        left_out = 0.9 * parts["step left out"]
        found[f"every=10 / plain, {name}"] = (
            1 + (extra / 10 + left_out) / usual["plain"]
        )
    return found


def plain_step(workload: Workload) -> None:
    workload.model.zero_grad(set_to_none=True)
    workload.losses().mean().backward()


def probed_step(workload: Workload, probe: fm.GradientProbe | fm.monitor.Watch) -> None:
    workload.model.zero_grad(set_to_none=True)
    probe.backward(workload.losses())


def watching(workload: Workload, folder: Path, **options) -> fm.monitor.Watch:
    """As by default, with an optimizer that has momentum."""
    optimizer = torch.optim.SGD(workload.model.parameters(), lr=0.1, momentum=0.9)
    return fm.monitor.watch(workload.model, optimizer, to=folder, **options)


def parts_of(workload: Workload, watch: fm.monitor.Watch, folder: Path) -> dict:
    """Seconds of CPU time, each a median."""
    probed_step(workload, watch)
    stats, losses = watch.stats, workload.losses().detach()
    optimizer = torch.optim.SGD(workload.model.parameters(), lr=0.1, momentum=0.9)
    monitor = fm.monitor.Monitor(
        fm.monitor.RunFolder(folder / "rows"), largest=8, histograms=True, spikes=6.0
    )
    idle, x = fm.monitor.watch(workload.model, every=10**6), torch.ones(16)
    idle.load_state_dict({**idle.state_dict(), "step": 1})
    x.requires_grad_()
    without = median(lambda: sum_of_squares(workload.parameters))
    by_parameter = median(lambda: each_square(workload.parameters))
    row = median(lambda: monitor.log(1, stats, loss=losses, optimizer=optimizer))
    monitor.close()
    return {
        "row": row,
        "norms of the mean by parameter": by_parameter - without,
        "step left out": median(lambda: idle.backward(x * 1.0))
        - median(lambda: (x * 1.0).mean().backward()),
    }


def median(call: Callable[[], object], rounds: int = 200) -> float:
    return statistics.median(seconds(call) for _ in range(rounds))


def seconds(call: Callable[[], object]) -> float:
    """CPU time of this thread."""
    start = time.thread_time_ns()
    call()
    return (time.thread_time_ns() - start) / 1e9


def quartiles(times: list[float], others: list[float]) -> list[float]:
    """Of the ratios of neighbouring steps."""
    ratios = [a / b for a, b in zip(times, others, strict=True)]
    return statistics.quantiles(ratios, n=4)


if __name__ == "__main__":
    main()
