"""What the machine code of every GPU kernel says, and whether it got worse.

python -m tools.kernels.report            the table
python -m tools.kernels.report --check    compare with baseline.json
python -m tools.kernels.report --update   write baseline.json anew

Needs no GPU. Every launch at the sizes of `tools/kernels/cases.py` is compiled
(half a second each), disassembled, and its registers, spills, shared memory,
occupancy, tensor-core instructions and 16-byte loads are counted. The .cu files are
compiled too where nvcc is. `--check` goes no further than Triton's first IR where that
is the baseline's, made by the same version of Triton. It exits with 1 and a sentence
for each kernel that spills registers, or that against the baseline lost its
tensor-core instructions, 16-byte loads or async copies, or has a lower occupancy.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from unittest import mock

from tools.kernels.cases import Case, launched
from tools.kernels.compile import find_nvcc
from tools.kernels.occupancy import MACHINES
from tools.kernels.rows import Row, cuda_rows, regressions, table, triton_rows

__all__ = ["as_json", "check", "collect", "main"]

HERE = Path(__file__).resolve().parent
# A minute of one core is what the check may take. This architecture gets every size and
# the CUDA files; the others one size of an op for each way of moving and adding data,
# and the one with the most registers for its loads.
COMPLETE = "sm_90a"
ELSEWHERE = (
    *("conv_fused", "conv_sq_norms", "layer_norm_gradients", "row_sq_norms"),
    *("sequence_fused", "sequence_sq_norms", "sum_over_time"),
    "sequence_sq_norms 16x512x768->3072 by torch",
    "channel_norm_gradients 64x64x49",
)
BASELINE = HERE / "baseline.json"
SOURCES = HERE.parents[1] / "csrc" / "cuda"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--architectures", default=",".join(MACHINES))
    parser.add_argument("-k", default="", help="only cases with this in their name")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    baseline = {} if options.update else json.loads(options.baseline.read_text())
    is_comparable = baseline.get("triton") == _version("triton")
    known = baseline["rows"] if options.check and is_comparable else {}
    rows, skipped = collect(options.architectures.split(","), options.k, known)
    print(table(rows))
    for reason in skipped:
        print(f"skipped: {reason}")
    print(f"{len(rows)} kernels in {time.perf_counter() - start:.0f} s")
    if options.update:
        options.baseline.write_text(as_json(rows))
    if not options.check:
        return 0
    worse, notes = check(rows, baseline or json.loads(options.baseline.read_text()))
    for note in notes:
        print(f"note: {note}")
    for sentence in worse:
        print(f"WORSE: {sentence}")
    return 1 if worse else 0


def collect(
    architectures: list[str], only: str = "", known: Mapping[str, dict] | None = None
) -> tuple[list[Row], list[str]]:
    """The rows of all kernels, and what was left out and why.

    `known` are rows whose counts hold for kernels of the same code.
    """
    rows: list[Row] = []
    skipped = []
    if _version("triton") is None:
        skipped.append("Triton kernels, as Triton is not installed")
    else:
        # A cache that is warm would hide what a change of the compiler does.
        with (
            tempfile.TemporaryDirectory() as cold,
            mock.patch.dict(os.environ, TRITON_CACHE_DIR=cold),
        ):
            for architecture in architectures:
                chosen = _chosen(architecture, only)
                rows += triton_rows(chosen, architecture, known)
    sources = sorted(SOURCES.glob("*.cu"))
    nvcc = find_nvcc()
    if sources and nvcc is None:
        skipped.append("CUDA files, as nvcc was not found")
    elif nvcc is not None:
        for architecture in {COMPLETE} & set(architectures):
            for source in sources:
                if only in f"cuda/{source.name}":
                    rows += cuda_rows(nvcc, source, architecture)
    return rows, skipped


def _chosen(architecture: str, only: str) -> list[Case]:
    """All cases, or of some ops and sizes the first."""
    chosen = list(launched())
    if architecture != COMPLETE:
        found = (
            [c for c in chosen if c.label.startswith(f"{name} ")] for name in ELSEWHERE
        )
        chosen = [of_name[0] for of_name in found if of_name]
    return [case for case in chosen if only in case.label]


def check(rows: Iterable[Row], baseline: dict) -> tuple[list[str], list[str]]:
    """What got worse, a sentence each; and what could not be compared."""
    old = baseline["rows"]
    ours, theirs = _version("triton"), baseline["triton"]
    worse, notes = [], []
    if ours != theirs:
        notes.append(
            f"The baseline is of Triton {theirs}, this is {ours}: only tensor cores "
            "and 16-byte loads of Triton kernels are compared."
        )
    for row in rows:
        if row.spills:
            worse.append(f"{row.key} spills registers ({row.spills} instructions).")
        is_cuda = row.case.startswith("cuda/")
        if row.key not in old:
            notes.append(f"{row.key} is not in the baseline; --update adds it.")
            continue
        same = is_cuda or ours == theirs
        worse += regressions(old[row.key], row, same_compiler=same)
    return worse, notes


def as_json(rows: Iterable[Row]) -> str:
    """One row a line, so that a change reads well in a diff.

    Raises:
        ValueError: for two rows of the same name.
    """
    rows = list(rows)
    times = Counter(row.key for row in rows)
    if twice := [key for key, count in times.items() if count > 1]:
        raise ValueError(f"These kernels are there more than once: {twice}.")
    lines = (
        f"  {json.dumps(row.key)}: {json.dumps(_kept(row))}"
        for row in sorted(rows, key=lambda row: row.key)
    )
    head = f'{{\n "triton": {json.dumps(_version("triton"))},\n "rows": {{\n'
    return head + ",\n".join(lines) + "\n }\n}\n"


def _kept(row: Row) -> dict:
    """What the key does not say."""
    names = ("case", "kernel", "architecture")
    return {k: v for k, v in row.as_dict().items() if k not in names}


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
