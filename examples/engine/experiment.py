"""What an experiment consists of."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .outcome import Verdict

__all__ = ["PRESETS", "Experiment", "Row", "Settings", "Task", "Watch", "load"]

PRESETS = ("quick", "laptop", "paper")

# A task, in values of JSON: what one worker does without a break, a stack of runs.
Task = dict[str, Any]
# What is recorded of one run, in values of JSON; a number that is not finite is None.
Row = dict[str, Any]


class Watch(Protocol):
    """What a running task tells the outside, and keeps there."""

    def progress(self, fraction: float) -> None:
        """Say which share of the task is done, 0 to 1; costs nothing if said often."""
        ...

    def load(self) -> Any:
        """What an earlier, killed worker saved of this task; None if it did not."""
        ...

    def save(self, state: Callable[[], Any]) -> None:
        """Keep `state()`, by `torch.save`, so that a killed task goes on from it.

        Called often; `state` only once a minute.
        """
        ...


@dataclass(frozen=True)
class Settings:
    """All that a record depends on besides its task; each experiment extends it.

    Attributes:
        preset: "quick", "laptop" or "paper".
        dataset: its name; "" for an experiment without data.
        seeds: each point of the grid is run once with each.
    """

    preset: str
    dataset: str
    seeds: tuple[int, ...]

    @property
    def fingerprint(self) -> str:
        """Tells results of one experiment from those of another.

        Not part of it: the seeds, so that an experiment can grow.
        """
        fields = dataclasses.asdict(self)
        del fields["seeds"]
        text = json.dumps(fields, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Experiment:
    """A claim of a paper, the runs that test it, and the function that decides.

    Attributes:
        id: its name on the command line.
        paper: short, "Jastrzebski et al. 2017".
        claim: one sentence.
        folder: of its README, records and figures, under examples/.
        settings: (preset, dataset) to the settings of its runs.
        tasks: the grid, cut into what one worker does at a time. The longest first.
        run: does one task; returns a row for each run. A function of its arguments
            only: no global state, no random number that the task does not seed.
        judge: the verdict of rows, those of failed runs left out. `expected` is how
            many rows a complete sweep has. Reads nothing but its arguments.
        draw: the figure of rows.
        rows: how many rows a task returns.
        datasets: in order of preference, by preset where they differ; () for an
            experiment without data.
        paper_number: what the paper reports, as read in it; "" if we quote none.
        minutes: measured with two workers, by preset, start-up included; that of laptop
            is taken from the records where there are some.
        nulls: rows changed so that the claim is false of them, by the name of what was
            done; the verdict must then not be HELD.
        exploratory: what part of it was chosen after looking at results; "" if none.
    """

    id: str
    paper: str
    claim: str
    folder: str
    settings: Callable[[str, str], Any]
    tasks: Callable[[Any], list[Task]]
    run: Callable[[Any, Task, Watch], list[Row]]
    judge: Callable[[Any, Sequence[Row], int], Verdict]
    draw: Callable[[Any, Sequence[Row]], Figure]
    rows: Callable[[Any, Task], int] = lambda settings, task: len(task["seeds"])
    datasets: tuple[str, ...] | Mapping[str, tuple[str, ...]] = ()
    paper_number: str = ""
    minutes: Mapping[str, float] = field(default_factory=dict)
    nulls: Callable[[Sequence[Row], int], Mapping[str, list[Row]]] = lambda *_: {}
    exploratory: str = ""

    def preferred(self, preset: str) -> tuple[str, ...]:
        """Data sets of a preset, in order of preference."""
        if isinstance(self.datasets, Mapping):
            return self.datasets[preset]
        return self.datasets

    def expected(self, settings: Settings) -> int:
        """How many rows a complete sweep has."""
        return sum(self.rows(settings, task) for task in self.tasks(settings))


def load(name: str) -> Experiment:
    """The experiment of that id, or of that place, "package.module:VARIABLE".

    Raises:
        ValueError: if there is none, with the ids that there are.
    """
    from examples.catalog import EXPERIMENTS

    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    module, colon, variable = name.partition(":")
    if not colon:
        raise ValueError(
            f"No experiment {name!r}; there are {', '.join(EXPERIMENTS)}. One of your "
            "own is named by its place, package.module:VARIABLE."
        )
    found = getattr(importlib.import_module(module), variable, None)
    if not isinstance(found, Experiment):
        raise ValueError(f"{name} is {found!r}, not an Experiment.")
    return found
