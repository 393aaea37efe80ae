"""How much faster a stack of replicas trains: `python -m examples.common.batching`.

Times a training step of one replica in a stack beside the ordinary loop over a module
and `torch.func`, in one thread, their rounds taken in turn. That they do the same is in
the tests.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap

from .stacks import Stack, cross_entropy, make_mlp, sgd_step

__all__ = ["main"]

CASES = {
    "3 layers of 50, S = 8": ((196, 50, 50, 50, 10), 8),
    "3 layers of 50, S = 32": ((196, 50, 50, 50, 10), 32),
    "20 layers of 50, S = 50": ((784, *(50,) * 20, 10), 50),
    "20 layers of 50, S = 500": ((784, *(50,) * 20, 10), 500),
}
REPLICAS = (4, 12)
SAMPLES = 2048
RATE = 0.01


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    columns = ["plain loop", *(f"{n}, {r}" for r in REPLICAS for n in ("vmap", "bmm"))]
    print("| network | " + " | ".join(columns) + " |\n" + "|---" * 6 + "|")
    for name, (sizes, size) in CASES.items():
        x = torch.randn(SAMPLES, sizes[0])
        y = torch.randint(0, 10, (SAMPLES,))
        steps = {"plain": plain(sizes, size, x, y)}
        for count in REPLICAS:
            steps[f"vmap{count}"] = vmapped(sizes, size, x, y, count)
            steps[f"bmm{count}"] = stacked(sizes, size, x, y, count)
        took = medians(steps)
        cells = [f"{1e6 * took['plain']:.0f} µs"]
        cells += [
            f"{took[f'{n}{count}'] / took['plain'] / count:.2f}"
            for count in REPLICAS
            for n in ("vmap", "bmm")
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


def plain(sizes: tuple[int, ...], size: int, x: Tensor, y: Tensor) -> Callable:
    """A step of an ordinary loop over a module."""
    model = make_mlp(sizes, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        index = torch.randint(0, SAMPLES, (size,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()

    return step


def stacked(
    sizes: tuple[int, ...], size: int, x: Tensor, y: Tensor, count: int
) -> Callable:
    """A step of a stack."""
    stack = Stack.drawn(sizes, range(count))
    rates = torch.full((count,), RATE)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        index = torch.randint(0, SAMPLES, (count, size), generator=generator)
        sgd_step(
            stack.params, stack.grads(cross_entropy(stack(x[index]), y[index])), rates
        )

    return step


def vmapped(
    sizes: tuple[int, ...], size: int, x: Tensor, y: Tensor, count: int
) -> Callable:
    """The same by `torch.func`."""
    models = [make_mlp(sizes, seed) for seed in range(count)]
    params, _ = stack_module_state(models)
    generator = torch.Generator().manual_seed(0)

    def loss(one: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(models[0], one, images), labels)

    gradient = vmap(grad(loss))

    def step() -> None:
        index = torch.randint(0, SAMPLES, (count, size), generator=generator)
        grads = gradient(params, x[index], y[index])
        with torch.no_grad():
            values = [grads[name] for name in params]
            torch._foreach_add_(list(params.values()), values, alpha=-RATE)

    return step


def medians(
    steps: dict[str, Callable], rounds: int = 15, each: int = 20
) -> dict[str, float]:
    """Median seconds of each step, their rounds taken in turn."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            start = time.process_time()
            for _ in range(each):
                step()
            found[name].append((time.process_time() - start) / each)
    return {name: statistics.median(times) for name, times in found.items()}


if __name__ == "__main__":
    main()
