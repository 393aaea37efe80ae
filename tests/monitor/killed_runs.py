"""Kills training loops that are watched, and looks at what they leave.

`python tests/monitor/killed_runs.py FOLDER --kills 50` forks so many processes, each of
which trains the same small model with `fm.monitor.watch(..., to=folder)`. A third of
them is killed from outside after a random number of steps, while they run on; the
others kill themselves at a random call or return within `fastminima.monitor`, or within
what writes the files, so between any two lines of a step. What is left is compared with
the files of a run that nobody killed:

- rows are the first lines of that run's, to the last step that was told of at least;
- of each row its spikes, samples and histogram are there;
- each file is whole lines, but for a last one, which going on takes away;
- `fastminima report` makes a page of it.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import torch
import torch._dynamo  # which optimizers import at their first step, in each process
from torch.nn import functional as F

import fastminima as fm
from fastminima.cli import main as fastminima

STEPS = 60
SPIKES = (12, 13, 27, 40, 41, 55)
FILES = ("rows", "samples", "histograms", "spikes")
MONITOR = Path(fm.__file__).with_name("monitor")
PLACES = (str(MONITOR), str(MONITOR / "run.py"))  # where a process kills itself
SIZE = 8  # bytes of a number in a pipe


def train(folder, told, steps=STEPS):
    """The loop: after each step its number is told."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    w = fm.monitor.watch(model, optimizer, to=folder)
    for step in range(steps):
        x = torch.randn(8, 6)
        losses = F.cross_entropy(model(x), (x[:, 0] > 0).long(), reduction="none")
        if step in SPIKES:
            losses = losses * torch.ones(8).index_fill(0, torch.tensor([5]), 1e3)
        optimizer.zero_grad()
        w.backward(losses, ids=[f"{step}.{n}" for n in range(8)])
        told(step)
        optimizer.step()
    return w


def killing_at(place=0, wanted=None):
    """Counts calls and returns within places; the process dies at one of them."""
    seen = [0] * len(PLACES)

    def profile(frame, event, _):
        for i, path in enumerate(PLACES):
            if frame.f_code.co_filename.startswith(path):
                seen[i] += 1
                if i == place and seen[i] == wanted:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)
    return seen


def forked(work):
    """Runs `work(tell)` in a process of its own; its number, and where it is heard."""
    hear, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work(lambda number: os.write(tell, number.to_bytes(SIZE, "big")))
            status = 0
        finally:
            os._exit(status)
    os.close(tell)
    return pid, hear


def next_number(hear):
    """What was told next, None at the end."""
    heard = os.read(hear, SIZE)
    return int.from_bytes(heard, "big") if heard else None


def all_numbers(hear):
    numbers = list(iter(lambda: next_number(hear), None))
    os.close(hear)
    return numbers


def whole_run(folder):
    """The files of a run that nobody kills, and its calls and returns in each place."""

    def work(tell):
        counts = killing_at()
        train(folder, lambda step: None)
        sys.setprofile(None)
        for count in counts:
            tell(count)

    pid, hear = forked(work)
    counts = all_numbers(hear)
    assert os.waitpid(pid, 0)[1] == 0
    return {name: lines(folder, name) for name in FILES}, counts


def kill(folder, place, moment):
    """Trains until it is killed; the last step that was told of, -1 for none.

    Without a place it is killed from outside, when that many steps were told of.
    """

    def work(tell):
        if place is not None:
            killing_at(place, moment)
        train(folder, tell)
        signal.pause()  # it is killed yet

    pid, hear = forked(work)
    heard = []
    if place is None:
        heard = [next_number(hear) for _ in range(moment)]
        os.kill(pid, signal.SIGKILL)
    heard += all_numbers(hear)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert heard == list(range(len(heard)))
    return len(heard) - 1


def lines(folder, name):
    """The whole lines of a file."""
    path = folder / f"{name}.jsonl"
    text = path.read_text() if path.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def steps(found):
    return [json.loads(line)["step"] for line in found]


def check(folder, last, wanted):
    """What a killed run left; the number of its rows."""
    found = {name: lines(folder, name) for name in FILES}
    rows = len(found["rows"])
    assert rows >= last + 1, (rows, last)
    for name, one in found.items():
        assert one == wanted[name][: len(one)], name
        needed = [step for step in steps(wanted[name]) if step < rows]
        assert len(one) >= len(needed), (name, rows)
    if rows:
        check_report(folder, found)
    return rows


def check_report(folder, found):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert fastminima(["report", str(folder), "--json"]) == 0
    said = json.loads(printed.getvalue())
    assert (said["rows"], said["spikes"]) == (len(found["rows"]), len(found["spikes"]))
    assert Path(said["output"]).stat().st_size > 10_000


def go_on(folder, wanted):
    """Train two steps more: they follow what was whole."""
    before = {name: lines(folder, name) for name in FILES}
    pid, hear = forked(lambda tell: train(folder, tell, 2))
    assert all_numbers(hear) == [0, 1]
    assert os.waitpid(pid, 0)[1] == 0
    for name, had in before.items():
        assert lines(folder, name) == had + wanted[name][: 0 if name == "spikes" else 2]


def killed_runs(folder, kills, seed):
    """The rows that each of the killed runs had."""
    wanted, counts = whole_run(folder / "whole")
    assert sorted(set(steps(wanted["spikes"]))) == list(SPIKES)
    draw, rows = random.Random(seed), []
    for number in range(kills):
        run, place = folder / str(number), (None, 0, 1)[number % 3]
        last = kill(
            run, place, draw.randrange(1, STEPS if place is None else counts[place])
        )
        rows.append(check(run, last, wanted))
        go_on(run, wanted)
        shutil.rmtree(run)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(killed_runs(options.folder, options.kills, options.seed)))
