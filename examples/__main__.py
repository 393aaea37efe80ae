"""Reruns of experiments: `python -m examples list`, `run`, `report`, `worker`."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and do what it says; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.do(options)
    except (ValueError, ImportError, LookupError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _list(options: argparse.Namespace) -> int:
    from .catalog import EXPERIMENTS
    from .engine.publish import minutes, status

    found = [
        {
            "id": e.id,
            "paper": e.paper,
            "claim": e.claim,
            "status": status(e),
            "minutes": minutes(e),
        }
        for e in EXPERIMENTS.values()
    ]
    if options.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return 0
    wide = max(len(e["id"]) for e in found)
    for e in found:
        minutes = ", ".join(f"{k} {v:g} min" for k, v in e["minutes"].items())
        print(f"{e['id']:{wide}}  {e['status']:10}  {e['claim']}")
        print(f"{'':{wide}}  {'':10}  {e['paper']}; {minutes or 'not timed'}")
    return 0


def _run(options: argparse.Namespace) -> int:
    from .common.tables import fitted, terminal_width
    from .engine.conclude import of_folder

    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {options.workers}.")
    folders = [_folder(name, options) for name in _names(options.ids)]
    if not options.json:
        for folder in folders:
            print(_describe(folder))
    if not options.plot_only:
        try:
            _work(folders, options)
        except KeyboardInterrupt:
            states = [folder.state() for folder in folders]
            done, of = (
                sum(getattr(s, k) for s in states) for k in ("finished", "tasks")
            )
            print(
                f"\nInterrupted: {done} of {of} tasks are kept; the same command goes "
                "on from there.",
                file=sys.stderr,
            )
            return 130
    conclusions = [of_folder(folder) for folder in folders]
    if options.json:
        found = [c.as_json() for c in conclusions]
        print(json.dumps(found[0] if len(found) == 1 else found, ensure_ascii=False))
        for c in conclusions:
            print(c.verdict, file=sys.stderr)
        return _code(conclusions)
    for folder, c in zip(folders, conclusions, strict=True):
        print()
        if len(conclusions) > 1:
            print(f"{c.experiment.id}: {c.experiment.claim}")
        if c.verdict.table:
            print(fitted(c.verdict.table, terminal_width()) + "\n")
        for message, count in c.failures.items():
            print(f"failed, {count} x: {message}")
        print(f"Records: {folder.path}")
        if c.rows:
            print(f"Figure:  {folder.path / 'figure.png'}")
        print()
        if c.experiment.exploratory:
            print(f"Exploratory: {c.experiment.exploratory}")
        print(c.verdict)
    return _code(conclusions)


def _code(conclusions: Sequence[Any]) -> int:
    """1 if not one run of an experiment was finished."""
    return 0 if all(c.rows for c in conclusions) else 1


def _work(folders: Sequence[Any], options: argparse.Namespace) -> None:
    from .engine import launch

    states = [folder.state() for folder in folders]
    if all(state.finished == state.tasks for state in states):
        return
    left = sum(state.tasks - state.finished for state in states)
    count = min(options.workers or launch.cores(), left)
    roots = [folder.path for folder in folders]
    if options.cluster:
        extra = dict(_setting(text) for text in options.cluster_option)
        workers = launch.cluster(options.cluster, roots, options.workers or 2, extra)
    else:
        limit = [] if options.time_limit is None else ["--time-limit"]
        limit += [] if options.time_limit is None else [str(options.time_limit)]
        workers = launch.local(roots, count, limit)
    with workers as started:
        launch.watch_until_done(folders, started, quiet=options.quiet)


def _worker(options: argparse.Namespace) -> int:
    from .engine import worker

    if options.with_parent:
        worker.end_with_parent()
    limit = math.inf if options.time_limit is None else options.time_limit
    count = worker.work(options.folders, time_limit=limit)
    if not options.with_parent:
        print(f"{count} tasks done; none is left.")
    return 0


def _status(options: argparse.Namespace) -> int:
    from .engine.folder import sweeps

    if not options.folder.is_dir():
        raise ValueError(f"There is no folder {options.folder}.")
    for folder in sweeps(options.folder):
        s = folder.state()
        words = f"{s.finished} of {s.tasks} tasks, {len(s.running)} running"
        words += f", {s.failed} failed" if s.failed else ""
        print(f"{folder.path.name}: {words}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .catalog import EXPERIMENTS
    from .engine.conclude import of_folder
    from .engine.experiment import PRESETS
    from .engine.folder import sweeps
    from .engine.page import page
    from .engine.publish import published

    conclusions = {}
    if options.results is None:
        for name, e in tqdm(EXPERIMENTS.items(), unit="experiment", leave=False):
            found = published(e)
            if found is not None:
                conclusions[name] = found
    else:  # of several sweeps of one experiment that of the largest preset
        folders = [f for f in sweeps(options.results) if f.experiment.id in EXPERIMENTS]
        for folder in sorted(folders, key=lambda f: PRESETS.index(f.settings.preset)):
            conclusions[folder.experiment.id] = of_folder(folder)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(list(EXPERIMENTS.values()), conclusions), "utf-8")
    print(f"{len(conclusions)} of {len(EXPERIMENTS)} experiments in {options.out}")
    return 0


def _publish(options: argparse.Namespace) -> int:
    from .engine.publish import publish, tables

    for name in options.ids:
        for path in publish(_folder(name, options)):
            print(path.relative_to(ROOT))
    for path, text in tables().items():
        if path.read_text() != text:
            path.write_text(text)
            print(path.relative_to(ROOT))
    return 0


def _check(options: argparse.Namespace) -> int:
    from .engine.publish import check

    wrong = check()
    for path in wrong:
        print(f"{path.relative_to(ROOT)}: its tables are not those of the records.")
    if not wrong:
        print("Every table is that of the records.")
    return 1 if wrong else 0


def _names(ids: Sequence[str]) -> list[str]:
    from .catalog import EXPERIMENTS

    return list(EXPERIMENTS) if list(ids) == ["all"] else list(ids)


def _folder(name: str, options: argparse.Namespace) -> Any:
    """The sweep that the options name, made if it is not there."""
    from .common import data
    from .engine.experiment import load
    from .engine.folder import Folder

    experiment = load(name)
    dataset = options.data or ""
    if dataset and not experiment.datasets:
        raise ValueError(f"{name} has no data set, got --data {dataset}.")
    if dataset:
        data.load(dataset)  # or an error that says where it was looked for
    elif experiment.datasets:
        dataset = data.first_of(experiment.preferred(options.preset))
    overrides = dict(_setting(text) for text in options.set)
    if options.seeds:
        overrides["seeds"] = _seeds(options.seeds)
    parts = [experiment.id, options.preset, dataset]
    parts += [f"{k}={_short(v)}" for k, v in overrides.items() if k != "seeds"]
    parts += [f"seeds={options.seeds}"] * bool(options.seeds)
    path = options.out / "-".join(p for p in parts if p)
    if getattr(options, "plot_only", False) and not (path / "sweep.json").exists():
        raise ValueError(f"Nothing of that was run: there is no {path}.")
    return Folder.create(path, name, options.preset, dataset, overrides)


def _short(value: Any) -> str:
    text = json.dumps(value).replace(" ", "")
    return "".join(c if c.isalnum() or c in ".,+" else "_" for c in text)


def _describe(folder: Any) -> str:
    e, state = folder.experiment, folder.state()
    data = f" on {folder.settings.dataset}" if folder.settings.dataset else ""
    wanted = e.preferred(folder.settings.preset)[:1] if e.datasets else ()
    note = ""
    if wanted and wanted[0] != folder.settings.dataset:
        note = f"\n(in place of {wanted[0]}, which was not found)"
    words = f"{e.id}: {e.claim}\n{e.paper}; {folder.settings.preset}{data}: "
    words += f"{e.expected(folder.settings)} runs in {state.tasks} tasks"
    if state.finished:
        words += f", {state.finished} finished before"
    outdated = folder.outdated()
    if outdated:
        words += f"; {outdated} records of other code are not counted"
    return words + note


def _setting(text: str) -> tuple[str, Any]:
    """A name and a value from "name=value", the value in JSON or plain text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"Settings are written name=value, got {text!r}.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _seeds(text: str) -> list[int]:
    """Seeds from "0-4,10"."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            found += range(int(first), int(last or first) + 1)
        except ValueError:
            raise ValueError(f"Seeds are written 0-4,10, got {text!r}.") from None
    if not found:
        raise ValueError(f"No seed is in {text!r}; they are written 0-4,10.")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, do: Any, about: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about, description=about)
        made.set_defaults(do=do)
        return made

    listed = command("list", _list, "list all experiments and what is known of them")
    listed.add_argument("--json", action="store_true", help="a list of objects")

    run = command("run", _run, "run experiments; a stopped one goes on where it was")
    run.add_argument("ids", nargs="+", metavar="ID", help="see list; or all")
    _where(run)
    run.add_argument("--workers", type=int, help="processes (default: processors)")
    run.add_argument("--plot-only", action="store_true", help="judge what there is")
    run.add_argument("--json", action="store_true", help="the verdict as JSON")
    run.add_argument("--quiet", action="store_true", help="no progress bar")
    run.add_argument("--time-limit", type=float, metavar="SECONDS", help="of a task")
    run.add_argument(
        "--cluster", help="slurm, submitit-local, ray or ray:ADDRESS (--workers many)"
    )
    run.add_argument(
        "--cluster-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="parameter of submitit, such as slurm_partition=gpu",
    )

    worker = command("worker", _worker, "do tasks of a folder until none is left")
    worker.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="of a sweep or several"
    )
    worker.add_argument("--time-limit", type=float, metavar="SECONDS", help="of a task")
    worker.add_argument("--with-parent", action="store_true", help=argparse.SUPPRESS)

    state = command("status", _status, "how far the sweeps of a folder are")
    state.add_argument("folder", type=Path, nargs="?", default=RESULTS)

    report = command("report", _report, "all experiments on one page of HTML")
    report.add_argument("--out", type=Path, default=RESULTS / "report.html")
    report.add_argument(
        "--results", type=Path, help="a folder of sweeps, in place of the records kept"
    )

    publish = command(
        "publish", _publish, "keep records in the repository, and renew all tables"
    )
    publish.add_argument("ids", nargs="*", metavar="ID")
    _where(publish, preset="laptop")

    command("check", _check, "whether all tables are those of the records kept")
    return parser


def _where(parser: argparse.ArgumentParser, preset: str = "quick") -> None:
    from .common.data import NAMES
    from .engine.experiment import PRESETS

    parser.add_argument("--preset", choices=PRESETS, default=preset)
    parser.add_argument("--data", choices=NAMES, help="default: the first one found")
    parser.add_argument("--seeds", metavar="0-4,10", help="in place of the preset's")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="one setting, its value in JSON: 0.1, [1, 2], text as it is",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of sweeps")


if __name__ == "__main__":
    sys.exit(main())
