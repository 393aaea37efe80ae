"""Training on the squared loss near the edge of stability, looked at on the way.

A small ReLU MLP, few enough samples and a rate large enough that full-batch descent
gets to lambda_max = 2/eta within some hundred steps. Batches of one epoch are drawn
without replacement. The network of half of He's weights starts well below the edge.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastminima as fm
from examples.common import data, measures
from examples.common.stacks import Stack, squared_loss
from examples.common.training import Orders, minibatches, train_steps
from examples.engine.experiment import Row, Settings, Task, Watch

__all__ = [
    "Edge",
    "late",
    "run_edge",
    "sample_losses",
    "settings_of",
    "tasks_of",
    "top",
]

Look = Callable[["Edge", int, Stack, int, Tensor, Tensor, Row], dict[str, float | None]]


@dataclass(frozen=True)
class Edge(Settings):
    """What is trained, and when it is measured.

    Attributes:
        samples: N, all of which are measured on.
        pool, skip: of `data.prepared`.
        hidden: units of each hidden layer.
        scale: of the initial weights, over those of He et al.
        batch_sizes: small to large, the last one N.
        steps: the same for all batch sizes; the second half counts.
        looks: measurements, evenly spaced over the steps.
        batches: mini-batches of one measurement.
    """

    samples: int = 512
    pool: int = 2
    skip: int = 6048
    hidden: tuple[int, ...] = (32, 32)
    scale: float = 0.5
    rate: float = 0.2
    batch_sizes: tuple[int, ...] = (4, 8, 16, 64, 512)
    steps: int = 8000
    looks: int = 24
    batches: int = 128
    chunk: int = 3


def settings_of(preset: str, dataset: str, batch_sizes: Sequence[int]) -> Edge:
    """The presets; `batch_sizes` less the full batch."""
    # Digits are less curved: at .2 the full batch stays below the edge.
    fits = {"pool": 1, "skip": 0, "rate": 0.4} if dataset == "digits" else {}
    if preset == "quick":
        fits |= {"steps": 2000, "looks": 10, "batches": 64, "chunk": 5, "samples": 256}
        sizes = (*(s for s in batch_sizes if s <= 32), 256)
        return Edge(preset, dataset, tuple(range(100, 105)), batch_sizes=sizes, **fits)
    if preset == "laptop":
        sizes = (*batch_sizes, 512)
        return Edge(preset, dataset, tuple(range(110, 116)), batch_sizes=sizes, **fits)
    if dataset != "digits":
        fits |= {"samples": 4096, "pool": 1, "hidden": (200, 200)}
    else:
        fits |= {"samples": 1600}
    sizes = (*batch_sizes, fits["samples"])
    fits |= {"steps": 40_000, "batch_sizes": sizes}
    return Edge(preset, dataset, tuple(range(110, 120)), **fits)


def tasks_of(edge: Edge) -> list[Task]:
    """A batch size and a few seeds; the full batch takes longest."""
    return [
        {"batch_size": size, "seeds": list(edge.seeds[at : at + edge.chunk])}
        for size in sorted(edge.batch_sizes, reverse=True)
        for at in range(0, len(edge.seeds), edge.chunk)
    ]


def run_edge(edge: Edge, task: Task, watch: Watch, look: Look) -> list[Row]:
    """Train a stack; `look` at each replica now and then.

    A row has the steps and, for each number that `look` returns, its values there.
    """
    x, y = data.prepared(
        edge.dataset, edge.samples, 1, seed=2026, pool=edge.pool, skip=edge.skip
    ).train
    x = x.flatten(1)
    seeds, size = task["seeds"], task["batch_size"]
    stack = Stack.drawn((x.shape[1], *edge.hidden, int(y.max()) + 1), seeds)
    with torch.no_grad():
        for p in stack.params:
            p.mul_(edge.scale)
    batches = _endless(Orders(seeds, len(x)), size)
    rates = torch.full((len(seeds),), edge.rate)
    rows: list[Row] = [{"seed": s, "batch_size": size, "step": []} for s in seeds]
    memory: list[Row] = [{} for _ in seeds]
    every = edge.steps // edge.looks
    for number in range(1, edge.looks + 1):
        some = (next(batches) for _ in range(every))
        train_steps(stack, x, y, rates, some, squared_loss)
        watch.progress(number / edge.looks)
        losses = stack.mean_loss(x, y, squared_loss)
        for at, row in enumerate(rows):
            found = {"loss": float(losses[at])}
            found |= look(edge, size, stack, at, x, y, memory[at])
            row["step"].append(number * every)
            for name, value in found.items():
                is_number = value is not None and value - value == 0
                row.setdefault(name, []).append(
                    float(f"{value:.4g}") if is_number else None
                )
    return rows


def top(
    model: nn.Module, batch: tuple[Tensor, Tensor], memory: Row
) -> tuple[float | None, Tensor]:
    """lambda_max of the full batch and its eigenvector; None if not converged.

    `memory` keeps the eigenvector, from which the next search starts.
    """
    hessian = fm.Hessian(model, measures.squared_error, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # converged is read
        start = memory.get("vector")  # then the residual is all that is asked for
        miss = 0.002 if start is None else 1.0
        pairs = fm.top_eigenpairs(hessian, rtol=1e-2, start=start, miss=miss)
    memory["vector"] = pairs.vectors[0]
    return (float(pairs.values[0]) if pairs.converged else None), pairs.vectors[0]


def sample_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Half the squared distance from the one-hot label, of every sample."""
    return squared_loss(model(batch[0]), batch[1])


def late(row: Row, name: str) -> float:
    """Mean over the second half of training; NaN where one is missing."""
    values = row[name][len(row[name]) // 2 :]
    if None in values:
        return float("nan")
    return sum(values) / len(values)


def _endless(orders: Orders, size: int) -> Iterator[Tensor]:
    while True:
        yield from minibatches(orders, size)
