"""Do SGD's learning rate and batch size set the width of the minimum by their ratio?

Experiment F1 of Jastrzebski et al. (2017), arXiv:1711.04623: train one network over a
grid of learning rates eta and batch sizes S, measure the curvature of where it ends,
and plot it against eta/S. Run it with

    python examples/three_factors/width.py --preset quick

It can be interrupted at any moment: the same command takes up where it stopped. What
must come out: width rises with eta/S, and hardly depends on eta and S beyond that.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from examples.common import data, records  # noqa: E402
from examples.common import workers as pool  # noqa: E402
from examples.three_factors.settings import (  # noqa: E402
    PRESETS,
    Run,
    Settings,
    preset,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, and run the experiment that it names."""
    options = _parse(arguments)
    dataset = data.load(options.data)
    is_cut = options.quickest or os.environ.get("FASTMINIMA_QUICK", "") not in ("", "0")
    settings = preset(options.preset, dataset.name, quickest=is_cut)
    path = options.out / f"width-{settings.preset}-{settings.dataset}.jsonl"
    print(_describe(settings, dataset, path, is_fallback=options.data == "auto"))
    return run(settings, path, workers=0 if options.plot_only else options.workers)


def run(settings: Settings, path: Path, workers: int) -> int:
    """Train what is missing (nothing with no workers), report and draw.

    Returns:
        0, or 1 without any finished run, or 130 when interrupted.
    """
    if workers:
        try:
            _train_missing(settings, path, workers)
        except KeyboardInterrupt:
            done = len(_recorded(settings, path))
            print(
                f"\nInterrupted: {done} of {len(settings.runs)} runs are kept; "
                "the same command goes on from there."
            )
            return 130
    return _conclude(settings, path)


def _conclude(settings: Settings, path: Path) -> int:
    from examples.three_factors import figure, report

    found = list(_recorded(settings, path).values())
    if not any(r["status"] == "finished" for r in found):
        print(f"No finished runs in {path}. Run without --plot-only, or see why above.")
        return 1
    table, _, sentence = report.report(settings, found).rpartition("\n\n")
    drawn = figure.draw(settings, found, path.with_suffix(".png"))
    print(f"\n{table}\n\nResults: {path}\nFigure:  {drawn}\n\n{sentence}")
    return 0


def _train_missing(settings: Settings, path: Path, count: int) -> None:
    from tqdm import tqdm

    done = _recorded(settings, path)
    missing = [run for run in settings.runs if run not in done]
    total = len(settings.runs) * settings.epochs
    with tqdm(
        total=total, initial=len(done) * settings.epochs, unit="epoch", smoothing=0.05
    ) as bar:
        bar.set_postfix_str(f"{len(done)}/{len(settings.runs)} runs")
        for news in pool.run(_work, [(settings, run, path) for run in missing], count):
            bar.update(news["epochs"])
            if news["finished"]:
                done[news["finished"]] = {}
                bar.set_postfix_str(f"{len(done)}/{len(settings.runs)} runs")


_splits: dict[str, data.Split] = {}


def _work(
    task: tuple[Settings, Run, Path], report: Callable[[dict[str, Any]], None]
) -> None:
    """One run, in a worker: train, and put the record on disk before saying so."""
    from examples.three_factors import train

    settings, run, path = task
    if settings.fingerprint not in _splits:
        _splits[settings.fingerprint] = data.split(
            data.load(settings.dataset), settings.train_size, settings.validation_size
        )
    seen = 0

    def on_epoch() -> None:
        nonlocal seen
        seen += 1
        report({"epochs": 1, "finished": None})

    record = train.train(settings, run, _splits[settings.fingerprint], on_epoch)
    records.append(path, record)
    report({"epochs": settings.epochs - seen, "finished": run})


def _recorded(settings: Settings, path: Path) -> dict[Run, dict[str, Any]]:
    """The runs of this experiment that are in the file, finished or diverged."""
    found = {}
    wanted = set(settings.runs)
    for record in records.read(path):
        if record.get("settings") != settings.fingerprint:
            continue
        run = Run(record["learning_rate"], record["batch_size"], record["seed"])
        if run in wanted:
            found[run] = record
    return found


def _describe(
    settings: Settings, dataset: data.Dataset, path: Path, *, is_fallback: bool
) -> str:
    ratios = {run.ratio for run in settings.runs}
    note = ""
    if is_fallback and dataset.name == "digits":
        note = (
            "\n(Fashion-MNIST was not found: digits of scikit-learn instead. "
            "See the README for where to put it.)"
        )
    return (
        f"Data: {dataset.name} ({dataset.source}), {settings.train_size} to train, "
        f"{settings.validation_size} to validate.{note}\n"
        f"Grid: {len(settings.pairs)} pairs (eta, S), {len(ratios)} ratios, "
        f"{len(settings.seeds)} seeds, {settings.epochs} epochs; results in {path}"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    parser.add_argument(
        "--data",
        choices=("auto", *data.NAMES),
        default="auto",
        help="auto: Fashion-MNIST where it is found, otherwise digits",
    )
    parser.add_argument(
        "--quickest",
        action="store_true",
        help="the preset cut down for CI, under 40 s for quick (or FASTMINIMA_QUICK=1)",
    )
    parser.add_argument(
        "--plot-only", action="store_true", help="report and draw what there is"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "three_factors")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        help="processes of one thread each (default: the processors available)",
    )
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers must be at least 1, got {options.workers}")
    return options


if __name__ == "__main__":
    sys.exit(main())
