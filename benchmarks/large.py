"""The largest eigenvalue at 100 million parameters: time, products, and peak memory.

    python -m benchmarks.large                     # about ten minutes on two cores
    python -m benchmarks.large --basis float32     # a basis in the vectors' own dtype
    python -m benchmarks.large --depth 1           # smaller: does it run

The network has GPT-2's width, vocabulary, tied head and start, with nine of its 12
blocks: 102.4 million parameters, on 2 rows of 64 random tokens. What is said of memory
is that of this process, which does nothing else: the kernel's high-water mark.
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch
from torch import Tensor, nn

import fastminima as fm
from benchmarks.memory import peak, resident
from benchmarks.models import GPT2
from benchmarks.records import describe_run, save

__all__ = ["largest_eigenvalue", "main"]

GB = 1e9
ALLOWED = 12.0  # GB
BATCH = 2
DTYPES = {"bfloat16": torch.bfloat16, "float32": None}


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean cross-entropy over all tokens."""
    ids, following = batch
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), following.flatten())


class Watched(fm.Hessian):
    """A Hessian that says what each product took, and how much memory there is."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.steps: list[dict[str, float]] = []

    def __matmul__(self, other: Tensor) -> Tensor:
        start = time.perf_counter()
        product = super().__matmul__(other)
        self.steps.append(
            {
                "seconds": time.perf_counter() - start,
                "resident_gb": resident() / GB,
                "peak_gb": peak() / GB,
            }
        )
        step = self.steps[-1]
        print(
            f"product {len(self.steps):3}: {step['seconds']:6.1f} s, "
            f"{step['resident_gb']:.2f} GB resident, {step['peak_gb']:.2f} at most",
            flush=True,
        )
        return product


def largest_eigenvalue(model: GPT2, basis: str, rtol: float, most: int) -> dict:
    """Runs it on random tokens, and says what it took."""
    start = time.perf_counter()
    count = sum(p.numel() for p in model.parameters())
    length = model.positions.num_embeddings
    ids = torch.randint(model.tokens.num_embeddings, (BATCH, length + 1))
    model_gb = resident() / GB
    print(f"{count / 1e6:.1f} million parameters, {model_gb:.2f} GB resident")
    hessian = Watched(model, loss_of, (ids[:, :-1].clone(), ids[:, 1:].clone()))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pairs = fm.top_eigenpairs(
            hessian, rtol=rtol, max_products=most, basis_dtype=DTYPES[basis]
        )
    (value,), (residual,) = pairs.values.tolist(), pairs.residuals.tolist()
    return {
        "parameters": count,
        "blocks": len(model.blocks),
        "tokens": [BATCH, length],
        "basis": basis,
        "rtol": rtol,
        "value": value,
        "residual": residual,
        "upper": pairs.upper,
        "converged": pairs.converged,
        "products": pairs.products,
        "seconds": time.perf_counter() - start,
        "vector_gb": 4 * count / GB,
        "model_gb": model_gb,
        "peak_gb": peak() / GB,
        "steps": hessian.steps,
        "warnings": [str(w.message) for w in said],
    }


def main() -> None:
    """One run, its record, and whether memory was what it may be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--basis", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--depth", type=int, default=9)
    parser.add_argument("--rtol", type=float, default=1e-2)
    parser.add_argument("--max-products", type=int, default=60)
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    run = describe_run(torch.get_num_threads())
    torch.manual_seed(0)
    found = largest_eigenvalue(
        GPT2(depth=options.depth), options.basis, options.rtol, options.max_products
    )
    shown = {name: value for name, value in found.items() if name != "steps"}
    for name, value in shown.items():
        print(f"{name:>11}: {value}")
    if not options.no_record:
        print(save({"run": run, "large": found}, suffix="-large"))
    if found["peak_gb"] > ALLOWED:
        raise SystemExit(f"The peak is above {ALLOWED:g} GB.")


if __name__ == "__main__":
    main()
