"""Measures the comparison tables, prints them, and keeps a record.

python -m benchmarks.tables                  all tables, about a quarter of an hour
python -m benchmarks.tables --quick          the small workloads, a minute or two
python -m benchmarks.tables --from FILE      draws a record again
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from pathlib import Path

import torch

from benchmarks.curvature import PROBLEMS, compare_eigenvalues, compare_products
from benchmarks.gradients import compare_gradients
from benchmarks.markdown import TITLES, render
from benchmarks.memory import peak_growth
from benchmarks.providers import by_name
from benchmarks.records import describe_run, describe_workload, save, summary
from benchmarks.workloads import WORKLOADS, build

COLUMNS = {
    "norms": tuple(WORKLOADS),
    "second_moments": tuple(WORKLOADS),
    "memory": ("W3", "W5"),
    "product": ("W1L", "W3", "W5"),
    "eigenvalue": tuple(PROBLEMS),
}
# (seconds a cell block may take, fewest rounds); the full run fits in 15 minutes on
# two idle cores.
FULL = {
    "norms": {"budget": 18.0, "min_rounds": 7},
    "second_moments": {"budget": 10.0, "min_rounds": 5},
    "product": {"budget": 12.0, "min_rounds": 5},
    "eigenvalue": {"budget": 30.0, "max_rounds": 5},
}
QUICK = {
    "norms": {"budget": 2.0, "min_rounds": 3},
    "second_moments": {"budget": 2.0, "min_rounds": 3},
    "product": {"budget": 2.0, "min_rounds": 3},
    "eigenvalue": {"budget": 5.0, "max_rounds": 1},
}
QUICK_COLUMNS = {"W1", "W1L", "W2", "W1L trained"}


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.record is not None:
        print(render(json.loads(options.record.read_text())))
        return
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    record = measure(options)
    path = save(record, options.output)
    print(render(record))
    print(f"Recorded in {path}")


def measure(options: argparse.Namespace) -> dict:
    """Runs what was asked for; after Ctrl-C, what there is by then."""
    for name in options.providers or ():
        by_name(name)
    settings = QUICK if options.quick else FULL
    work = [
        (table, column)
        for table in options.tables
        for column in _columns(table, options)
    ]
    record: dict = {
        "run": describe_run(options.threads),
        "settings": {"quick": options.quick, **settings},
        "workloads": {
            name: describe_workload(build(name))
            for name in dict.fromkeys(column.split()[0] for _, column in work)
        },
        "tables": {},
    }
    bar = _bar(len(work))
    for table, column in work:
        bar.set_description(f"{table} {column}")
        try:
            cells = _cells(
                table, column, options, settings, record, bar.set_postfix_str
            )
        except KeyboardInterrupt:
            bar.write(f"Stopped at {table} {column}; what came before is kept.")
            break
        except Exception as error:
            bar.write(f"{table} {column} failed: {type(error).__name__}: {error}")
            record.setdefault("failed", {})[f"{table} {column}"] = repr(error)
            continue
        record["tables"].setdefault(table, {})[column] = cells
        bar.update()
    bar.close()
    return record


def _cells(table, column, options, settings, record, progress) -> dict:
    if table == "memory":
        return _memory(column, options, record, progress)
    asked = {"names": options.providers, "progress": progress, **settings[table]}
    if table == "eigenvalue":
        results = compare_eigenvalues(column, include_slow=options.slow, **asked)
        return {name: _eigenvalue(result) for name, result in results.items()}
    if table == "product":
        results = compare_products(build(column), **asked)
    else:
        results = compare_gradients(build(column), table, **asked)
    return {name: summary(result) for name, result in results.items()}


def _eigenvalue(result) -> dict:
    fields = dict(vars(result))
    del fields["solve"]
    verdict = fields.pop("verdict")
    if verdict:
        fields |= {"right": verdict.ok, "worst_error": verdict.worst}
        if not verdict.ok:
            fields |= {"seconds": [], "gradients": []}
    return fields


def _memory(column, options, record, progress) -> dict:
    """Peak growth of every provider of norms and second moments found right."""
    cells = {"plain": _growth(column, "norms", "plain", {}, options, progress)}
    for measure_name in ("norms", "second_moments"):
        timed = record["tables"].get(measure_name, {}).get(column)
        if timed is None:
            # Only to know who is right, and the best chunk.
            results = compare_gradients(
                build(column), measure_name, options.providers, budget=0, min_rounds=1
            )
            timed = {name: summary(result) for name, result in results.items()}
        for name, cell in timed.items():
            provider = name.split(",")[0]
            label = name if measure_name == "norms" else f"{name} second_moments"
            if provider == "plain" and measure_name == "norms" and name != "plain":
                settings = {"without_norms": True}
                cells[name] = _growth(
                    column, "norms", "plain", settings, options, progress
                )
            elif provider == "plain":
                continue
            elif cell.get("skipped") or not cell["right"]:
                cells[label] = cell
            else:
                try:
                    cells[label] = _probed(
                        column, measure_name, name, cell, options, progress
                    )
                except RuntimeError as failure:
                    said = str(failure).splitlines()
                    cells[label] = {"skipped": f"{said[0]} {said[-1]}"}
    return cells


def _probed(column, measure_name, name, cell, options, progress) -> dict:
    settings = dict(cell["settings"])
    if column in by_name(name).without_norms:
        settings["without_norms"] = True
    growth = _growth(column, measure_name, name, settings, options, progress)
    growth["note"] = cell["note"]
    if "without_norms" in settings:
        growth["baseline"] = "plain, norm parameters off"
    return growth


def _growth(column, measure_name, name, settings, options, progress) -> dict:
    progress(f"{name} {measure_name}")
    runs = [
        peak_growth(column, measure_name, name, settings, options.threads)
        for _ in range(2 if measure_name == "norms" and not options.quick else 1)
    ]
    mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
    return {"right": True, "worst_error": 0.0, "runs": runs, **mean}


def _columns(table: str, options: argparse.Namespace) -> list[str]:
    columns = COLUMNS[table]
    if options.workloads and table == "memory":
        return options.workloads
    if options.workloads:
        return [name for name in columns if name.split()[0] in options.workloads]
    return [name for name in columns if not options.quick or name in QUICK_COLUMNS]


def _bar(total: int):
    from tqdm import tqdm

    return tqdm(total=total, file=sys.stderr, dynamic_ncols=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables")

    def words(known):
        def parse(text: str) -> list[str]:
            chosen = text.split(",")
            if unknown := [word for word in chosen if word not in known]:
                raise argparse.ArgumentTypeError(
                    f"unknown {', '.join(unknown)}; choose from {', '.join(known)}"
                )
            return chosen

        return parse

    parser.add_argument("--quick", action="store_true", help="few rounds, small nets")
    parser.add_argument("--workloads", type=words(WORKLOADS), help="such as W1,W3")
    parser.add_argument("--tables", type=words(TITLES), default=list(TITLES))
    parser.add_argument(
        "--providers",
        type=lambda text: text.split(","),
        help="such as vmap,opacus-ghost",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--slow", action="store_true", help="also searches of minutes")
    parser.add_argument("--output", type=Path, help="where to keep the record")
    parser.add_argument("--from", dest="record", type=Path, help="a record to draw")
    return parser


if __name__ == "__main__":
    main()
