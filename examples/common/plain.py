"""The ordinary training loop of one network, for networks too large for a stack.

A fixed or cyclic learning rate and batch size; can be killed at any moment, and then
ends with the same bits as if it had not been.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastminima as fm
from examples.engine.experiment import Watch

from .data import Split

__all__ = ["STATUSES", "Cycle", "History", "chosen_device", "evaluate", "train"]

STATUSES = FINISHED, DIVERGED, UNTRAINED = ("finished", "diverged", "untrained")
# Steps between two looks at the loss, each of which waits for a GPU.
LOOK = 50
# A loss of this many times that of guessing has diverged, though it is finite.
BLOWN_UP = 1e3
# A network that is right less often than this times guessing was not trained.
LEAST = 1.5

# Images and a generator to images of the same shape.
Augment = Callable[[Tensor, torch.Generator], Tensor]
Point = dict[str, Any]


@dataclass(frozen=True)
class Cycle:
    """A cycle of eta / S between two values, as of `fm.optim.CyclicRatio`.

    Attributes:
        low, high: the two ratios.
        epochs: length of a cycle: twice that of a stage.
        vary: "lr": the batch size stays; "batch_size": the learning rate stays.
        shape: "square" or "triangle".
        first: "low" or "high".
    """

    low: float
    high: float
    epochs: float
    vary: str = "lr"
    shape: str = "square"
    first: str = "low"


@dataclass
class History:
    """What came of a training.

    Attributes:
        points: measurements in turn, each with epoch, samples, steps, the rate and
            batch_size of the step before, train_loss, train_accuracy,
            validation_loss, validation_accuracy and what `measure` returned.
        status: "finished"; "diverged": the loss was not finite, or a thousand times
            that of guessing; "untrained": right on less than 1.5 times as many training
            samples as by naming their commonest class.
        steps: of the optimizer.
        samples: seen in them.
    """

    points: list[Point] = field(default_factory=list)
    status: str = FINISHED
    steps: int = 0
    samples: int = 0


def train(
    model: nn.Module,
    data: Split,
    *,
    rate: float,
    batch_size: int,
    epochs: int,
    seed: int,
    schedule: Cycle | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    augment: Augment | None = None,
    watch: Watch | None = None,
    measure_every: float = 1.0,
    measure: Callable[[nn.Module], dict[str, Any]] | None = None,
    measured_samples: int | None = None,
    until: Callable[[Point], bool] | None = None,
    device: torch.device | str | None = None,
    precision: str = "float32",
) -> tuple[nn.Module, History]:
    """SGD on the mean cross-entropy; trains `model` itself, on the device chosen.

    Every batch is full: the samples that an epoch has left over begin the next one, so
    that eta / S is what it is said to be. Batches, dropout and augmentation depend on
    `seed` only, and leave PyTorch's own generators as they were.

    Args:
        model: its weights as drawn; see `networks.make`.
        data: images and labels to train on and to validate.
        rate, batch_size: eta and S. A schedule replaces one of the two.
        epochs: to train for.
        seed: of the order of samples, of dropout and of augmentation.
        schedule: a cycle; None keeps both constant.
        momentum, weight_decay: of `torch.optim.SGD`.
        augment: such as `augment.shift_and_flip`; applied to each batch.
        watch: is told of progress and keeps the state, from which a killed run goes on.
        measure_every: epochs between two points of the history. The first is measured
            before the first step, the last at the end.
        measure: more to measure, of the network in evaluation mode; may change nothing.
        measured_samples: train_loss is that of the first so many; None for all.
        until: says of a point whether to stop there, such as at a wanted loss.
        device: None is the first GPU, or the CPU without one.
        precision: "float32"; "tf32" or "bfloat16" (autocast), faster on GPUs.

    Raises:
        ValueError: for an unknown precision, or what the sampler or the cycle refuse.

    Returns:
        the model, in evaluation mode, and its history.
    """
    device = chosen_device(device)
    model.to(device)
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.SGD(
        model.parameters(), lr=rate, momentum=momentum, weight_decay=weight_decay
    )
    count = len(data.train[1])
    sampler = fm.optim.BatchSizeSampler(count, batch_size, seed=seed, last="carry")
    cycle = None if schedule is None else _cycle(optimizer, sampler, schedule, count)
    sets = {
        "train": tuple(t[:measured_samples].to(device) for t in data.train),
        "validation": tuple(t.to(device) for t in data.validation),
    }

    def measured(model: nn.Module) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, (x, y) in sets.items():
            found[f"{name}_loss"], found[f"{name}_accuracy"] = evaluate(model, x, y)
        return found | (measure(model) if measure else {})

    x, y = (t.to(device) for t in data.train)
    with _precision(precision, device), _generators(device, seed) as generators:
        loop = _Loop(
            model, optimizer, sampler, cycle, generators, epochs, measure_every
        )
        _run(loop, x, y, augment, measured, until, watch)
    return model.eval(), loop.history


def chosen_device(device: torch.device | str | None = None) -> torch.device:
    """The device of that name; of none, the first GPU, or the CPU without one."""
    if device is None:
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@torch.no_grad()
def evaluate(
    model: nn.Module, x: Tensor, y: Tensor, piece: int = 1000
) -> tuple[float, float]:
    """Mean cross-entropy and share of right answers, in evaluation mode."""
    was_training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    right = torch.zeros((), dtype=torch.int64, device=x.device)
    for images, labels in zip(x.split(piece), y.split(piece), strict=True):
        scores = model(images)
        loss += F.cross_entropy(scores.float(), labels, reduction="sum")
        right += (scores.argmax(dim=1) == labels).sum()
    model.train(was_training)
    return float(loss) / len(y), int(right) / len(y)


@dataclass
class _Loop:
    """All that changes in a training, and so all of its state."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    sampler: fm.optim.BatchSizeSampler
    cycle: fm.optim.CyclicRatio | None
    generators: list[torch.Generator]
    epochs: int
    every: float
    history: History = field(default_factory=History)
    # Of the losses since the last look, and of how many.
    loss_sum: float = 0.0
    last: tuple[float, int] = (0.0, 0)
    is_stopped: bool = False

    @property
    def is_over(self) -> bool:
        return self.is_stopped or self.sampler.epoch >= self.epochs

    def is_due(self) -> bool:
        """Whether the next step would pass a place where to measure."""
        interval, seen = self.every * self.sampler.n, self.sampler.samples_seen
        place = math.ceil(seen / interval - 1e-9) * interval
        return seen + self.sampler.next_batch_size > place + 1e-9 * interval

    def state(self) -> dict[str, Any]:
        return {
            "model": _on_cpu(self.model.state_dict()),
            "optimizer": _on_cpu(self.optimizer.state_dict()),
            "sampler": self.sampler.state_dict(),
            "cycle": None if self.cycle is None else self.cycle.state_dict(),
            "generators": [g.get_state() for g in self.generators],
            "points": list(self.history.points),
            "steps": self.history.steps,
            "loss_sum": float(self.loss_sum),
            "last": self.last,
            "is_stopped": self.is_stopped,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        if self.cycle is not None:
            self.cycle.load_state_dict(state["cycle"])
        for generator, saved in zip(self.generators, state["generators"], strict=False):
            generator.set_state(saved)
        self.history.points = state["points"]
        self.history.steps = state["steps"]
        self.history.samples = self.sampler.samples_seen
        self.loss_sum, self.last = state["loss_sum"], state["last"]
        self.is_stopped = state["is_stopped"]


def _run(
    loop: _Loop,
    x: Tensor,
    y: Tensor,
    augment: Augment | None,
    measured: Callable[[nn.Module], dict[str, Any]],
    until: Callable[[Point], bool] | None,
    watch: Watch | None,
) -> None:
    """Train to the end, or until the loss is no number."""
    state = None if watch is None else watch.load()
    if state is not None:
        loop.restore(state)
    else:
        loop.last = (_rate(loop), loop.sampler.next_batch_size)
        _measure(loop, measured, until)
    labels = y.bincount()
    most = BLOWN_UP * math.log(max(2, len(labels)))
    history, total = loop.history, loop.epochs * loop.sampler.n
    while not loop.is_over:
        for index in loop.sampler.consumed(loop.sampler):
            _step(loop, x, y, torch.tensor(index, device=x.device), augment)
            if history.steps % LOOK == 0:
                mean = float(loop.loss_sum) / LOOK
                loop.loss_sum = 0.0
                if not mean <= most:
                    history.status = DIVERGED
                    return
            if loop.is_due():
                _measure(loop, measured, until)
            if watch is not None:
                watch.progress(history.samples / total)
                watch.save(loop.state)
            if loop.is_over:
                break
    _measure(loop, measured, until)
    last = history.points[-1]
    if not math.isfinite(last["train_loss"]):
        history.status = DIVERGED
    elif last["train_accuracy"] < LEAST * int(labels.max()) / len(y):
        history.status = UNTRAINED


def _step(
    loop: _Loop, x: Tensor, y: Tensor, index: Tensor, augment: Augment | None
) -> None:
    """One step of SGD, counted."""
    images = x[index]
    if augment is not None:
        images = augment(images, loop.generators[0])
    loop.last = (_rate(loop), len(index))
    loop.model.train()
    loop.optimizer.zero_grad()
    loss = F.cross_entropy(loop.model(images).float(), y[index])
    loss.backward()
    loop.optimizer.step()
    if loop.cycle is not None:
        loop.cycle.step()
    loop.loss_sum = loop.loss_sum + loss.detach().double()  # pyright: ignore[reportAttributeAccessIssue]
    loop.history.steps += 1
    loop.history.samples = loop.sampler.samples_seen


def _measure(
    loop: _Loop,
    measured: Callable[[nn.Module], dict[str, Any]],
    until: Callable[[Point], bool] | None,
) -> None:
    """Add a point to the history, if this step has none yet."""
    history = loop.history
    if history.points and history.points[-1]["steps"] == history.steps:
        return
    states = [g.get_state() for g in loop.generators]
    loop.model.eval()
    rate, size = loop.last
    point = {
        "epoch": history.samples / loop.sampler.n,
        "samples": history.samples,
        "steps": history.steps,
        "rate": rate,
        "batch_size": size,
        **measured(loop.model),
    }
    for generator, saved in zip(loop.generators, states, strict=True):
        generator.set_state(saved)
    history.points.append(point)
    loop.is_stopped |= until is not None and until(point)


def _rate(loop: _Loop) -> float:
    return float(loop.optimizer.param_groups[0]["lr"])


def _cycle(
    optimizer: torch.optim.Optimizer,
    sampler: fm.optim.BatchSizeSampler,
    cycle: Cycle,
    count: int,
) -> fm.optim.CyclicRatio:
    return fm.optim.CyclicRatio(
        optimizer,
        sampler,
        cycle.low,
        cycle.high,
        cycle.epochs * count,
        cycle.vary,  # pyright: ignore[reportArgumentType]
        cycle.shape,  # pyright: ignore[reportArgumentType]
        first=cycle.first,  # pyright: ignore[reportArgumentType]
    )


@contextlib.contextmanager
def _generators(device: torch.device, seed: int) -> Iterator[list[torch.Generator]]:
    """One for augmentation, then those of PyTorch that dropout draws from, seeded.

    The latter are afterwards as they were before.
    """
    own = [torch.Generator(), torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        own.append(torch.cuda.default_generators[device.index])
    states = [g.get_state() for g in own]
    seeds = np.random.SeedSequence((seed, 7919)).generate_state(len(own))
    for generator, number in zip(own, seeds, strict=True):
        generator.manual_seed(int(number))
    try:
        yield own
    finally:
        for generator, saved in zip(own, states, strict=True):
            generator.set_state(saved)


@contextlib.contextmanager
def _precision(name: str, device: torch.device) -> Iterator[None]:
    """Arithmetic of that name; on GPUs the same bits in every run."""
    if name not in ("float32", "tf32", "bfloat16"):
        raise ValueError(
            f'precision must be "float32", "tf32" or "bfloat16", got {name!r}.'
        )
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, name == "tf32"
    is_low = name == "bfloat16"
    try:
        with (
            torch.backends.cudnn.flags(
                enabled=True, deterministic=True, allow_tf32=name == "tf32"
            ),
            torch.autocast(device.type, torch.bfloat16, enabled=is_low),
        ):
            yield
    finally:
        matmul.allow_tf32 = before


def _on_cpu(value: Any) -> Any:
    """The same with tensors on the CPU, so that another machine can go on."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {k: _on_cpu(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(v) for v in value)
    return value
