"""What each preset trains, and for how long."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from itertools import product

__all__ = ["PRESETS", "Run", "Settings", "preset"]

PRESETS = ("quick", "laptop", "paper")


@dataclass(frozen=True)
class Settings:
    """One experiment: a network, a grid, and what is measured.

    Attributes:
        hidden: width of each hidden layer of the ReLU MLP.
        pairs: (learning rate, batch size) of the grid.
        seeds: each pair is trained once with each.
        rungs: train losses, falling; the first time a run gets below one, the network
            is measured.
        measure_size: training samples that losses and curvature are measured on.
        products: Hessian products for each stochastic estimate.
        checks: train-loss evaluations an epoch, in search of the next rung.
    """

    preset: str
    dataset: str
    train_size: int
    validation_size: int
    hidden: tuple[int, ...]
    pairs: tuple[tuple[float, int], ...]
    seeds: tuple[int, ...]
    epochs: int
    rungs: tuple[float, ...]
    measure_size: int
    products: int
    checks: int = 4

    @property
    def runs(self) -> list[Run]:
        """Every run of the grid, the longest (smallest batches) first."""
        grid = [
            Run(rate, size, seed)
            for seed, (rate, size) in product(self.seeds, self.pairs)
        ]
        return sorted(grid, key=lambda run: run.batch_size)

    @property
    def fingerprint(self) -> str:
        """Tells results of one experiment from those of another.

        Not part of it: which pairs and seeds, so that a grid can grow.
        """
        fields = dataclasses.asdict(self)
        del fields["pairs"], fields["seeds"]
        text = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Run:
    """One training run."""

    learning_rate: float
    batch_size: int
    seed: int

    @property
    def ratio(self) -> float:
        """Learning rate over batch size, rid of rounding so that equal ones are ==."""
        return float(f"{self.learning_rate / self.batch_size:.4g}")


def preset(name: str, dataset: str, *, quickest: bool = False) -> Settings:
    """The settings of a preset for a data set; `quickest` is its form for CI."""
    settings = {"quick": _quick, "laptop": _laptop, "paper": _paper}[name](dataset)
    if not quickest:
        return settings
    return dataclasses.replace(
        settings,
        preset=f"{name}-ci",
        pairs=_grid(
            _DIGITS_RATIOS[:3] if dataset == "digits" else (5e-4, 1e-3, 2e-3),
            (16, 32, 64),
        ),
        epochs=max(1, settings.epochs // 2),
        rungs=(0.5, 0.25, 0.1),
        measure_size=min(512, settings.measure_size),
        products=12,
        checks=2,
    )


def _grid(ratios: tuple[float, ...], sizes: tuple[int, ...]) -> tuple:
    """(eta, S) for each ratio at each batch size: the scalings beta = S / min(S)."""
    return tuple((float(f"{r * s:.6g}"), s) for r, s in product(ratios, sizes))


# Curvature on the 8x8 digits is a fifth of that on Fashion-MNIST; where it times eta
# stays far below 1 the ratio hardly acts: higher ratios there, and shorter training.
_DIGITS_RATIOS = (6.3e-4, 1.6e-3, 4e-3, 1e-2)


def _quick(dataset: str) -> Settings:
    is_small = dataset == "digits"
    ratios = _DIGITS_RATIOS if is_small else (2.5e-4, 6.3e-4, 1.6e-3, 4e-3)
    return Settings(
        preset="quick",
        dataset=dataset,
        train_size=1440 if is_small else 2048,
        validation_size=357 if is_small else 4000,
        hidden=(50, 50, 50),
        pairs=_grid(ratios, (8, 16, 32)),
        seeds=(0, 1, 2) if is_small else (0, 1),
        epochs=24 if is_small else 40,
        rungs=(0.5, 0.25, 0.1, 0.05),
        measure_size=1024,
        products=24,
    )


def _laptop(dataset: str) -> Settings:
    is_small = dataset == "digits"
    return Settings(
        preset="laptop",
        dataset=dataset,
        train_size=1440 if is_small else 12_000,
        validation_size=357 if is_small else 10_000,
        hidden=(50,) * 20,
        pairs=_grid((5e-5, 1e-4, 2e-4, 5e-4), (16, 32, 64)),
        seeds=(0, 1),
        epochs=200 if is_small else 40,
        rungs=(0.7, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05),
        measure_size=1440 if is_small else 2000,
        products=50,
        checks=2 if is_small else 4,
    )


# The 16 pairs of a reproducibility study, 15 epochs each.
_STUDY = (
    *((0.05, 50), (0.05, 1000), (0.025, 500), (0.04, 1000), (0.02, 500), (0.02, 100)),
    *((0.01, 50), (0.01, 100), (0.02, 200), (0.005, 1000), (0.03, 50), (0.02, 50)),
    *((0.06, 75), (0.015, 100), (0.011, 100), (0.0075, 100)),
)
# And within the paper's range, three batch sizes for each of four ratios.
_SCALINGS = (
    *_grid((5e-5,), (100, 200, 500)),
    *_grid((1e-4, 2e-4, 2.5e-4), (50, 100, 200)),
)


def _paper(dataset: str) -> Settings:
    is_small = dataset == "digits"
    return Settings(
        preset="paper",
        dataset=dataset,
        train_size=1440 if is_small else 50_000,
        validation_size=357 if is_small else 10_000,
        hidden=(50,) * 20,
        pairs=tuple(dict.fromkeys(_STUDY + _SCALINGS)),
        seeds=(0, 1),
        epochs=15,
        rungs=(0.7, 0.6, 0.5, 0.42, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1),
        measure_size=1440 if is_small else 4000,
        products=100,
    )
