"""How fast each op could be on a GPU at best, and which implementation that favours.

python -m tools.kernels.floors                a table of bounds on an H100
python -m tools.kernels.floors --json FILE    the same as JSON
python -m tools.kernels.floors --preferences  lines for fastminima/ops/preferences.py

These are bounds and not predictions: what memory and arithmetic allow when nothing else
costs. Three columns: `floor`, the least that any implementation needs; `kernel`, the
same for the kernels as they are compiled (its launches, its own sums of partial
results, tensor cores or not, a grid that leaves multiprocessors idle); `plain`, the
reference in PyTorch, an operation after the other, each at the full speed of the
machine. A kernel is preferred when it takes less than `MARGIN` of the plain way's bound
at every size: it was not measured, and the bound of plain PyTorch is what libraries
come close to. Records of a GPU shall replace this model as soon as there are some.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fastminima.ops.preferences import Preference
from tools.kernels.cases import Case, Tensors, all_ops, cases
from tools.kernels.measured import SOURCE, measured_preferences
from tools.kernels.tally import tally
from tools.kernels.work import Work, work_of

__all__ = ["H100", "MARGIN", "Bound", "Rates", "bounds", "main", "prefer"]

BASELINE = Path(__file__).with_name("baseline.json")
# Kernels are taken to reach two thirds of their bound.
MARGIN = 2 / 3


@dataclass(frozen=True)
class Rates:
    """What a GPU does in a second."""

    memory: float  # bytes, read and written
    bfloat16: float  # operations of matrix products
    float32: float
    launch: float  # seconds of a kernel that does nothing, queued behind another
    multiprocessors: int

    def products(self, dtype: torch.dtype) -> float:
        return self.float32 if dtype == torch.float32 else self.bfloat16

    def seconds(self, work: Work, dtype: torch.dtype) -> float:
        """Without a launch."""
        return max(work.bytes / self.memory, work.products / self.products(dtype))


H100 = Rates(
    memory=3.0e12,  # measured elsewhere: copies on the device
    bfloat16=790e12,  # measured elsewhere: a product of 8192 x 8192 matrices
    float32=67e12,  # literature: data sheet of the H100 SXM, without tensor cores
    launch=3e-6,  # literature: 2 to 4 us between kernels of one stream
    multiprocessors=132,
)


@dataclass(frozen=True)
class Bound:
    """Lower bounds on the time of one op at one size, in seconds."""

    case: str
    op: str
    dtype: torch.dtype
    bytes: int
    products: int
    floor: float
    kernel: float | None  # None: no kernel, or none in the report on kernels
    plain: float | None  # None: what it does depends on values
    limit: str

    @property
    def speedup(self) -> float | None:
        """Of the kernel over the plain way, as far as bounds can tell."""
        if self.kernel is None or self.plain is None:
            return None
        return self.plain / self.kernel


def bounds(rates: Rates = H100, backend: str = "reference") -> list[Bound]:
    """Every case of every op that has this implementation."""
    rows = json.loads(BASELINE.read_text())["rows"]
    return [_bound(case, rows, rates) for case in cases(backend)]


def _bound(case: Case, rows: dict, rates: Rates) -> Bound:
    work = work_of(case.op.name, case.make(Tensors("meta", case.dtype)))
    least = rates.seconds(work, case.dtype)
    is_bytes = work.bytes / rates.memory >= least
    return Bound(
        case.label,
        case.op.name,
        case.key,
        *work,
        floor=rates.launch + least,
        kernel=_kernel(case, work, rows, rates),
        plain=_plain(case, rates),
        limit="memory" if is_bytes else "products",
    )


# Their plain way needs values: it runs on the CPU to be counted, unless too large.
_TAKES_VALUES = ("embedding_sq_norms", "embedding_second_moment", "embedding_gram")
_NOT_COUNTED = ("embedding_gradients", "same_values")


def _plain(case: Case, rates: Rates) -> float | None:
    """PyTorch's operations, each of which reads its inputs and writes its outputs.

    They convert halves to float32 first, and multiply in float32. Of the reference and
    the table's other way by PyTorch, the faster.
    """
    name = case.op.name
    if name in _NOT_COUNTED:
        return None
    device = "cpu" if name in _TAKES_VALUES else "meta"
    arguments = case.make(Tensors(device, case.dtype))
    return min(
        _in_turn(tally(case.op.on(way, "cpu", case.key), arguments).steps, rates)
        for way in ("reference", "torch")
        if case.has(way)
    )


def _in_turn(steps: list[Work], rates: Rates) -> float:
    return sum(rates.launch + rates.seconds(s, torch.float32) for s in steps)


# Kernels in CUDA C++ on vectors and lists. Those for embeddings sort first, in a number
# of launches that depends on the sizes, and are not modelled.
_CUDA = (
    *("lanczos_step", "power_step", "dots", "project_out", "linear_combinations"),
    *("multi_sq_norm", "langevin_step_"),
)
_CUDA_PASSES, _CUDA_LAUNCHES = 2, 4  # at most: sum, finish, update, finish


def _kernel(case: Case, work: Work, rows: dict, rates: Rates) -> float | None:
    """The launcher's own operations, its launches, and the work of its main kernel."""
    if case.op.name in _CUDA:
        moving = _CUDA_PASSES * work.bytes / rates.memory
        return _CUDA_LAUNCHES * rates.launch + moving
    mine = [
        row
        for key, row in rows.items()
        if key.startswith(f"{case.label} | ") and key.endswith("sm_90a")
    ]
    if not mine or not case.has("triton"):
        return None
    arguments = case.make(Tensors("meta", case.dtype))
    found = tally(case.op.on("triton", "cuda", case.key), arguments)
    own = _in_turn(found.steps, rates)
    own += sum(rates.seconds(beside, torch.float32) for _, beside in found.beside)
    # The one that multiplies; the others finish sums.
    main = max(mine, key=lambda row: (row["tensor"] > 0, row["loop"]))
    speed = rates.bfloat16 if main["tensor"] else _issued(main) * rates.float32
    products = work.products / speed / _filled(main["blocks"], rates)
    return (
        own
        + len(found.launches) * rates.launch
        + max(work.bytes / rates.memory, products)
    )


def _issued(row: dict) -> float:
    """Share of the float32 rate that a loop can reach: one instruction a clock."""
    return row["loop_fp32"] / row["loop"] if row["loop_fp32"] else 1.0


def _filled(blocks: int, rates: Rates) -> float:
    """Share of the multiprocessors that work, on average over the rounds of blocks."""
    rounds = -(-blocks // rates.multiprocessors)
    return blocks / (rounds * rates.multiprocessors)


def prefer(found: list[Bound]) -> dict[tuple[str, torch.dtype], Preference]:
    """By op and dtype: what the model says is faster, by the worst size."""
    least: dict[tuple[str, torch.dtype], float] = {}
    for bound in found:
        if bound.speedup is not None:
            key = bound.op, bound.dtype
            least[key] = min(bound.speedup, least.get(key, float("inf")))
    return {
        key: Preference(_kind(key[0]) if s * MARGIN > 1 else "reference", s, _MODELLED)
        for key, s in sorted(least.items(), key=str)
    }


def decide() -> dict[tuple[str, torch.dtype], Preference]:
    """What was measured decides; where nothing was, the bounds do."""
    found = prefer(bounds()) | measured_preferences()
    there = all_ops()  # a record may time more
    return {k: told for k, told in sorted(found.items(), key=str) if k[0] in there}


_MODELLED = "bounds for an H100, not measured"
_NAMES = {torch.float32: "_FLOAT", torch.bfloat16: "_HALF", torch.int64: "_IDS"}


def _kind(op: str) -> str:
    return "cuda" if op in _CUDA else "triton"


def table(found: list[Bound]) -> str:
    """Microseconds, a line each."""
    lines = [
        f"{'op, size':56}{'MB':>9}{'GFLOP':>9}{'floor':>9}{'kernel':>9}{'plain':>9}"
        f"{'limit':>10}"
    ]
    for b in found:
        times = "".join(
            f"{'-' if t is None else f'{t * 1e6:.1f}':>9}"
            for t in (b.floor, b.kernel, b.plain)
        )
        amounts = f"{b.bytes / 1e6:9.2f}{b.products / 1e9:9.2f}"
        lines.append(f"{b.case[:55]:56}{amounts}{times}{b.limit:>10}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--preferences", action="store_true")
    options = parser.parse_args(arguments)
    if options.preferences:
        for (op, dtype), told in decide().items():
            kind = _NAMES[dtype]
            rest = "" if told.source == SOURCE else f', "{told.source}"'
            value = f'Preference("{told.backend}", {told.speedup:.2g}{rest})'
            print(f'    ("{op}", {kind}): {value},')
        return
    found = bounds()
    print(table(found))
    print("\nTimes in microseconds; bounds, nothing was measured.")
    if options.json:
        rows = [asdict(bound) for bound in found]
        options.json.write_text(json.dumps(rows, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
