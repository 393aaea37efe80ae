"""Batch sharpness: what settles at 2/eta when batches are small.

Batch sharpness is E[g'Hg / |g|^2], g and H both of one mini-batch, averaged over
mini-batches of the size trained with: the curvature that a step meets. lambda_max is
that of the loss of all samples. Both are given over 2/eta. Means over the second half
of training, by seed.

Criteria:
1. for S = 8 and 16 batch sharpness is within .75 … 1.25 of 2/eta,
2. while lambda_max is below .75 of it;
3. control: for the full batch both are within .9 … 1.1.
The bounds were set after trial runs with seeds 100 and 101, which the laptop and paper
presets do not use. 1 is "near 2/eta", to a quarter; where the interval leaves out 2/eta
itself, the verdict says so.

Nulls: batch sharpness replaced by lambda_max (nothing but lambda_max matters), and the
batch sizes in reverse.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from examples.common import plots
from examples.common.second_order import copies, directional_curvature
from examples.common.stacks import Stack, squared_loss
from examples.engine.experiment import Experiment, Row, Task, Watch
from examples.engine.outcome import Claim, Verdict, decide, mean_and_spread

from .edge import Edge, late, run_edge, settings_of, tasks_of, top

__all__ = ["EXPERIMENT"]

SMALL = (8, 16)
# Mini-batches whose Hessian products are made at once.
AT_ONCE = 64


def settings(preset: str, dataset: str) -> Edge:
    return settings_of(preset, dataset, (4, 8, 16, 64))


def run(edge: Edge, task: Task, watch: Watch) -> list[Row]:
    return run_edge(edge, task, watch, _look)


def _look(
    edge: Edge, size: int, stack: Stack, at: int, x: Tensor, y: Tensor, memory: Row
) -> dict[str, float | None]:
    """Both sharpnesses over 2/eta; `memory` has the generator of mini-batches."""
    value, _ = top(stack.module(at), (x, y), memory)
    draw = memory.setdefault("draw", torch.Generator().manual_seed(31 + at))
    count = 1 if size == len(x) else edge.batches
    index = torch.stack(
        [torch.randperm(len(x), generator=draw)[:size] for _ in range(count)]
    )
    found = torch.cat(
        [
            directional_curvature(
                copies(stack, at, len(part)), x[part], y[part], squared_loss
            )
            for part in index.split(AT_ONCE)
        ]
    )
    half = edge.rate / 2
    return {
        "lambda_max": None if value is None else half * value,
        "batch_sharpness": half * float(found.mean()),
    }


def judge(edge: Edge, rows: Sequence[Row], expected: int) -> Verdict:
    full = edge.batch_sizes[-1]

    def values(size: int, name: str) -> list[float]:
        return [late(r, name) for r in rows if r["batch_size"] == size]

    claims = [
        Claim(f"batch sharpness·η/2 at S {s}", values(s, "batch_sharpness"), 0.75, 1.25)
        for s in SMALL
    ]
    claims += [
        Claim(f"λ_max·η/2 at S {s}", values(s, "lambda_max"), high=0.75) for s in SMALL
    ]
    claims += [
        Claim("full batch: batch sharpness", values(full, "batch_sharpness"), 0.9, 1.1),
        Claim("full batch: λ_max", values(full, "lambda_max"), 0.9, 1.1),
    ]
    short = "; ".join(
        f"{'full batch' if s == full else f'S {s}'}: batch sharpness "
        f"{mean_and_spread(values(s, 'batch_sharpness'), 2)}, λ_max "
        f"{mean_and_spread(values(s, 'lambda_max'), 2)}"
        for s in (*SMALL, full)
    )
    known = {"found": len(rows), "expected": expected, "table": _table(edge, rows)}
    known["short"] = f"over 2/η, {short}"
    verdict = decide(claims, **known)
    near = [
        str(size)
        for size, found in zip(SMALL, verdict.findings, strict=False)
        if found.low > 1 or found.high < 1
    ]
    if not near:
        return verdict
    words = f"2/η itself is outside the interval at S {' and '.join(near)}: near it."
    return decide(claims, **known, remark=words)


def _table(edge: Edge, rows: Sequence[Row]) -> str:
    lines = ["    S   batch sharpness·η/2   λ_max·η/2         train loss at the end"]
    for size in edge.batch_sizes:
        mine = [r for r in rows if r["batch_size"] == size]
        cells = [
            mean_and_spread([late(r, name) for r in mine])
            for name in ("batch_sharpness", "lambda_max")
        ]
        loss = mean_and_spread([r["loss"][-1] for r in mine], 2)
        lines.append(f"{size:5d}   {cells[0]:21} {cells[1]:17} {loss}")
    return "\n".join(lines)


def draw(edge: Edge, rows: Sequence[Row]) -> Figure:
    figure, axes = plots.figure(3, sharey=True)
    names = {"batch_sharpness": "batch sharpness", "lambda_max": "λ_max, all samples"}
    looks = dict(zip(names, plots.colours(3), strict=False))
    full = edge.batch_sizes[-1]
    for ax, size in zip(axes[0, :2], (SMALL[0], full), strict=True):
        mine = [r for r in rows if r["batch_size"] == size]
        for name, label in names.items():
            values = [[r[name][i] for r in mine] for i in range(edge.looks)]
            steps = mine[0]["step"] if mine else []
            look = {"color": looks[name], "marker": ".", "points": False}
            plots.with_spread(ax, steps, values, label=label, **look)
        ax.axvspan(edge.steps / 2, edge.steps, color=plots.GRID, alpha=0.5, lw=0)
        plots.mark_line(ax, 1.0, "2/η")
        ax.set_title("full batch" if size == full else f"S = {size}")
        ax.set_xlabel("steps (shaded: what is averaged)")
    axes[0, 0].set_ylabel("sharpness over 2/η")
    axes[0, 0].legend(loc="upper left")
    axes[0, 0].set_ylim(0, 1.6)
    right = axes[0, 2]
    for name, marker in zip(names, plots.MARKERS, strict=False):
        values = [
            [late(r, name) for r in rows if r["batch_size"] == s]
            for s in edge.batch_sizes
        ]
        look = {"color": looks[name], "marker": marker}
        plots.with_spread(right, edge.batch_sizes, values, **look)
    right.set_xscale("log")
    plots.few_ticks(right, edge.batch_sizes)
    plots.mark_line(right, 1.0, "2/η")
    right.set(xlabel="batch size S", title="second half of training")
    plots.caption(
        figure,
        "With small batches the curvature that a mini-batch's step meets settles near "
        "2/η; λ_max of all samples stays below. With the full batch both are there.",
        f"{edge.dataset}, N = {edge.samples}, squared loss, ReLU MLP "
        f"{'-'.join(map(str, edge.hidden))}, η {edge.rate:g}; "
        f"{len({r['seed'] for r in rows})} seeds, bars: one standard deviation.",
    )
    return figure


def nulls(rows: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    sizes = sorted({r["batch_size"] for r in rows})
    turned = dict(zip(sizes, sizes[::-1], strict=True))
    return {
        "batch sharpness is λ_max": [
            {**r, "batch_sharpness": r["lambda_max"]} for r in rows
        ],
        "batch sizes in reverse": [
            {**r, "batch_size": turned[r["batch_size"]]} for r in rows
        ],
    }


EXPERIMENT = Experiment(
    id="batch-sharpness",
    paper="arXiv:2412.20553 (2024)",
    claim="With small batches E[gᵀHg/|g|²] of mini-batches settles within a quarter "
    "of 2/η while λ_max of the full batch stays below.",
    folder="noise_and_sharpness",
    settings=settings,
    tasks=tasks_of,
    run=run,
    judge=judge,
    draw=draw,
    datasets=("fashion-mnist", "digits"),
    # Half of the clock of one worker, beside other work.
    nulls=nulls,
)
