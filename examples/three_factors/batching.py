"""Which is faster on this machine: a process a run, or runs batched over replicas?

Times one training step of one replica, on one thread, three ways: a plain PyTorch loop
(what the worker processes of width.py do), `torch.func.vmap` over the parameters of
six replicas, and six replicas written out as batched matrix products.

    python examples/three_factors/batching.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, func, nn

REPLICAS, SAMPLES = 6, 2000
CASES = {
    "quick, S = 8": ((784, 50, 50, 50, 10), 8),
    "quick, S = 32": ((784, 50, 50, 50, 10), 32),
    "paper, S = 50": ((784, *(50,) * 20, 10), 50),
    "paper, S = 500": ((784, *(50,) * 20, 10), 500),
}


def plain(sizes: tuple[int, ...], batch: int, x: Tensor, y: Tensor) -> Callable:
    """One step of one replica."""
    model = mlp(sizes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    index = torch.randint(0, SAMPLES, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()

    return step


def vmapped(sizes: tuple[int, ...], batch: int, x: Tensor, y: Tensor) -> Callable:
    """One step of all replicas by torch.func."""
    base = mlp(sizes)
    params, _ = func.stack_module_state([mlp(sizes) for _ in range(REPLICAS)])
    params = {k: v.detach() for k, v in params.items()}
    index = torch.randint(0, SAMPLES, (REPLICAS, batch))

    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(func.functional_call(base, p, (x,)), y)

    gradient = func.vmap(func.grad(loss))

    def step() -> None:
        grads = gradient(params, x[index], y[index])
        torch._foreach_add_(list(params.values()), list(grads.values()), alpha=-0.01)

    return step


def written_out(sizes: tuple[int, ...], batch: int, x: Tensor, y: Tensor) -> Callable:
    """One step of all replicas by batched matrix products."""
    shapes = list(pairwise(sizes))
    weights = [0.1 * torch.randn(REPLICAS, a, b) for a, b in shapes]
    biases = [torch.zeros(REPLICAS, 1, b) for _, b in shapes]
    params = [p.requires_grad_() for p in weights + biases]
    index = torch.randint(0, SAMPLES, (REPLICAS, batch))

    def step() -> None:
        h = x[index]
        for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
            h = torch.baddbmm(b, h, w)
            h = h if i == len(weights) - 1 else h.relu()
        loss = F.cross_entropy(h.flatten(0, 1), y[index].flatten(), reduction="sum")
        grads = torch.autograd.grad(loss, params)
        with torch.no_grad():
            torch._foreach_add_(params, grads, alpha=-0.01 / batch)

    return step


def mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    """A ReLU MLP."""
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def medians(steps: dict[str, Callable], rounds: int = 15, each: int = 20) -> dict:
    """Median seconds of each step, their rounds taken in turn."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            start = time.perf_counter()
            for _ in range(each):
                step()
            found[name].append((time.perf_counter() - start) / each)
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(f"A training step of one replica, {REPLICAS} replicas batched")
    print(f"{'':16}{'plain loop':>12}{'torch.func':>12}{'written out':>13}")
    for name, (sizes, batch) in CASES.items():
        x, y = torch.randn(SAMPLES, sizes[0]), torch.randint(0, 10, (SAMPLES,))
        makers = {"plain": plain, "vmap": vmapped, "bmm": written_out}
        took = medians({k: make(sizes, batch, x, y) for k, make in makers.items()})
        shares = {k: took[k] / took["plain"] / REPLICAS for k in ("vmap", "bmm")}
        absolute, cells = f"{1e6 * took['plain']:.0f} us", shares.values()
        print(f"{name:16}{absolute:>12}", *(f"{c:11.2f}x" for c in cells))


if __name__ == "__main__":
    main()
