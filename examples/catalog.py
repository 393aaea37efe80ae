"""All experiments, by id, in the order in which they are listed."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

from .engine.experiment import Experiment

__all__ = ["EXPERIMENTS"]

# A module an experiment; each has it as EXPERIMENT.
_MODULES: tuple[str, ...] = (
    "three_factors.width",
    "three_factors.interpolation",
    "three_factors.same_ratio",
    "three_factors.batchnorm_line",
    "three_factors.exchange",
    "three_factors.memorization",
    "three_factors.breakdown",
    "three_factors.stages",
    "three_factors.batchnorm",
    "three_factors.linear_scaling",
    "three_factors.bowls",
    "three_factors.regression",
    "three_factors.stationarity",
    "three_factors.svag",
    "breuel_subproblems.modes",
    "kleinberg_escape.one_dimension",
    "kleinberg_escape.network",
    "congregation.restarts",
    "langevin_volume.volume",
    "langevin_volume.network",
    "online_ica.ica",
    "noise_and_sharpness.gap",
    "noise_and_sharpness.batch_sharpness",
    "noise_and_sharpness.covariance_end",
    "edge_of_stability.gradient_descent",
    "edge_of_stability.adam",
    "edge_of_stability.sgd",
)


def _load(modules: Iterable[str]) -> dict[str, Experiment]:
    found = [import_module(f"examples.{name}").EXPERIMENT for name in modules]
    return {experiment.id: experiment for experiment in found}


EXPERIMENTS = _load(_MODULES)
