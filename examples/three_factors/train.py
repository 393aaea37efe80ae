"""One training run, measured with fastminima's probes inside its own loop."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastminima as fm
from examples.common.data import Split

from .settings import Run, Settings

__all__ = ["Instruments", "make_model", "train"]

Batch = tuple[Tensor, Tensor]


def train(
    settings: Settings,
    run: Run,
    data: Split,
    on_epoch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train one network; returns the run's record, ready for JSON.

    It is measured the first time its train loss gets below each rung, and at the end.
    A loss that is no longer finite ends the run, with status "diverged".
    """
    started = time.perf_counter()
    torch.manual_seed(run.seed)
    model = make_model(settings, data.train[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=run.learning_rate)
    instruments = Instruments(model, settings, run, data)
    x, y = data.train[0].flatten(1), data.train[1]
    steps = len(y) // run.batch_size
    check = max(1, steps // settings.checks)
    rungs = list(settings.rungs)
    measured: list[dict[str, Any]] = []
    is_finite = True
    for epoch in range(settings.epochs):
        order = torch.randperm(len(y))[: steps * run.batch_size]
        for step, index in enumerate(order.split(run.batch_size)):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            if (step + 1) % check:
                continue
            loss = instruments.train_loss()
            is_finite = math.isfinite(loss)
            if not is_finite:
                break
            if rungs and loss <= rungs[0]:
                rungs = [rung for rung in rungs if rung < loss]
                measured.append(instruments.measure(optimizer, epoch + step / steps))
        on_epoch()
        if not is_finite:
            break
    if is_finite:
        measured.append(instruments.measure(optimizer, settings.epochs))
    return {
        "settings": settings.fingerprint,
        "preset": settings.preset,
        "dataset": settings.dataset,
        **dataclasses.asdict(run),
        "ratio": run.ratio,
        "status": "finished" if is_finite else "diverged",
        "seconds": round(time.perf_counter() - started, 2),
        "measurements": measured,
    }


def make_model(settings: Settings, images: Tensor) -> nn.Sequential:
    """The ReLU MLP, its weights drawn as He et al. (2015) and its biases 0.

    Twenty layers do not train from PyTorch's default, which shrinks the signal by
    sqrt(6) a layer; what the paper drew from is not known.
    """
    sizes = (images[0].numel(), *settings.hidden, 10)
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(sizes):
        linear = nn.Linear(d_in, d_out)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Instruments:
    """The probes of one run, all on the same samples of the training set."""

    def __init__(
        self, model: nn.Module, settings: Settings, run: Run, data: Split
    ) -> None:
        def some(part: Batch, size: int) -> Batch:
            return part[0][:size].flatten(1), part[1][:size]

        self.model, self.run = model, run
        self.dataset_size = len(data.train[1])
        self.products = settings.products
        self.train_batch = some(data.train, settings.measure_size)
        self.validation_batch = some(data.validation, settings.validation_size)
        self.gradients = fm.GradientProbe(model)
        self.is_audited = False  # compared with plain autograd, once
        self.sharpness = fm.SharpnessProbe(model, mean_loss)
        self.hessian = fm.Hessian(model, mean_loss, self.train_batch)

    @torch.no_grad()
    def train_loss(self) -> float:
        """Mean loss on the measured samples."""
        return mean_loss(self.model, self.train_batch).item()

    def measure(self, optimizer: torch.optim.Optimizer, epoch: float) -> dict[str, Any]:
        """Loss, accuracy, gradient noise and curvature now; moves nothing."""
        x, y = self.train_batch
        losses = F.cross_entropy(self.model(x), y, reduction="none")
        if not self.is_audited:
            audit = self.gradients.audit(losses)
            if not audit.ok:
                raise RuntimeError(f"The probe disagrees with autograd.\n{audit}")
            self.is_audited = True
        stats = self.gradients.backward(losses)
        optimizer.zero_grad()
        # The statistics are those of the measured samples; the noise that of a step.
        factors = dataclasses.replace(
            fm.three_factors(optimizer, stats),
            batch_size=self.run.batch_size,
            dataset_size=self.dataset_size,
        )
        pairs = self.sharpness(self.train_batch)
        frobenius = fm.frobenius_norm(self.hessian, products=self.products)
        trace = fm.trace(self.hessian, products=self.products)
        validation_loss, validation_accuracy = self._evaluate(self.validation_batch)
        return {
            "epoch": round(epoch, 3),
            "train_loss": losses.mean().item(),
            "train_accuracy": self._evaluate(self.train_batch)[1],
            "validation_loss": validation_loss,
            "validation_accuracy": validation_accuracy,
            "covariance_trace": float(stats.covariance_trace),
            "noise_ratio": factors.ratio,
            "temperature": factors.temperature,
            "lambda_max": float(pairs.values[0]),
            "lambda_max_residual": float(pairs.residuals[0]),
            "frobenius_norm": float(frobenius.value),
            "frobenius_norm_error": float(frobenius.standard_error),
            "trace": float(trace.value),
            "trace_error": float(trace.standard_error),
        }

    @torch.no_grad()
    def _evaluate(self, batch: Batch) -> tuple[float, float]:
        scores = self.model(batch[0])
        right = scores.argmax(dim=1) == batch[1]
        return F.cross_entropy(scores, batch[1]).item(), right.float().mean().item()


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The training loss of a batch, as fastminima's curvature half wants it."""
    return F.cross_entropy(model(batch[0]), batch[1])
