"""Measures the comparison tables, prints them, and keeps a record.

python -m benchmarks.tables                  all tables, half an hour on two idle cores
python -m benchmarks.tables --quick          the small workloads, a few minutes
python -m benchmarks.tables --from FILE      draws a record again

The record is written after each column, so that what stops a run loses no more.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from benchmarks.curvature import compare_eigenvalues, compare_products
from benchmarks.gradients import compare_gradients
from benchmarks.gradients_oracle import Truth, sample_truth
from benchmarks.markdown import TITLES, render
from benchmarks.memory_cells import memory_cells
from benchmarks.plan import FULL, QUICK, Block, blocks
from benchmarks.providers import by_name
from benchmarks.records import describe_run, describe_workload, save, summary
from benchmarks.workloads import WORKLOADS, build


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.record is not None:
        print(render(json.loads(options.record.read_text())))
        return
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    record = start(options)
    path = save(record, options.output)
    measure(record, options, keep=lambda: save(record, path))
    print(render(record))
    print(f"Recorded in {path}")


def start(options: argparse.Namespace) -> dict:
    """The record of a run, with nothing measured yet."""
    for name in options.providers or ():
        by_name(name)
    work = blocks(options.tables, options.workloads, quick=options.quick)
    return {
        "run": describe_run(options.threads),
        "settings": {"quick": options.quick, **(QUICK if options.quick else FULL)},
        "workloads": {
            name: describe_workload(build(name))
            for name in dict.fromkeys(block.workload for block in work)
        },
        "tables": {},
    }


def measure(
    record: dict, options: argparse.Namespace, keep: Callable[[], object]
) -> None:
    """Runs what was asked for; after Ctrl-C the record has what there is by then."""
    work = blocks(options.tables, options.workloads, quick=options.quick)
    bar = _bar(work)
    measured: dict[str, dict] = {table: {} for table in options.tables}
    for block in work:
        table, column = block.table, block.column
        bar.set_description(f"{table} {column}")
        try:
            cells = _cells(block, options, record, bar.set_postfix_str)
        except KeyboardInterrupt:
            bar.write(f"Stopped at {table} {column}; what came before is kept.")
            break
        except Exception as error:
            bar.write(f"{table} {column} failed: {type(error).__name__}: {error}")
            record.setdefault("failed", {})[f"{table} {column}"] = repr(error)
        else:
            measured[table][column] = cells
            record["tables"] = {
                t: columns for t, columns in measured.items() if columns
            }
        bar.update(block.seconds)
        keep()
    bar.close()


@lru_cache(maxsize=1)
def _truth(name: str) -> Truth:
    return sample_truth(build(name))


def _cells(
    block: Block, options: argparse.Namespace, record: dict, progress
) -> dict[str, dict]:
    table, column = block.table, block.column
    asked = {"names": options.providers, "progress": progress}
    asked |= record["settings"][table]
    if table == "eigenvalue":
        found = compare_eigenvalues(column, include_slow=options.slow, **asked)
        return {name: _eigenvalue(result) for name, result in found.items()}
    if table == "memory":
        done = record["tables"]
        known = {m: done[m].get(column, {}) for m in done}
        return memory_cells(
            column,
            known,
            threads=options.threads,
            truth=lambda: _truth(column),
            **asked,
        )
    if table == "product":
        results = compare_products(build(column), **asked)
    else:
        progress(f"{column}: float64 oracle")
        results = compare_gradients(build(column), table, truth=_truth(column), **asked)
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


def _bar(work: list[Block]):
    """A bar in seconds as estimated, so that what it says is left is about right."""
    from tqdm import tqdm

    total = sum(block.seconds for block in work)
    print(
        f"{len(work)} columns, about {max(1, round(total / 60))} minutes on two idle "
        "cores with all libraries installed",
        file=sys.stderr,
    )
    shape = "{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining} {postfix}"
    return tqdm(total=total, file=sys.stderr, dynamic_ncols=True, bar_format=shape)


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
