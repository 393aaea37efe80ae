"""watch(accelerator, model) in a training loop, against single-sample gradients."""

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import DataLoader
from training import (
    BATCH,
    BATCHES,
    UNEVEN,
    Rows,
    accumulators,
    check,
    check_steps_taken,
    classifier,
    dataset,
    fail_in_backward,
    joined,
    losses,
    open_files,
)

import fastminima as fm
from fastminima.capture.session.states import Nothing


@pytest.fixture(autouse=True)
def _no_state_of_other_accelerators():
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def prepared(samples=BATCH * BATCHES, **options):
    accelerator = accelerate.Accelerator(cpu=True, **options)
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(dataset(samples), batch_size=BATCH)
    return accelerator, *accelerator.prepare(model, optimizer, loader)


def train(accelerator, model, optimizer, loader, cast=None):
    """The loop of accelerate's documentation; what each batch saw."""
    seen = []
    for x, y in loader:
        x = x if cast is None else x.to(cast)
        with accelerator.accumulate(model):
            bare = copy.deepcopy(accelerator.unwrap_model(model, False))
            seen.append((bare, (x, y)))
            loss = losses(model, (x, y)).mean()
            with torch.no_grad():
                model(x[:2])  # such as an evaluation: not the batch
            accelerator.backward(loss)
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_rows_are_those_of_single_samples(accumulate):
    """With two batches a step the last ones differ in size, with three one is left."""
    accelerator, model, optimizer, loader = prepared(
        UNEVEN, gradient_accumulation_steps=accumulate
    )
    rows = Rows()
    watch = fm.callbacks.watch(accelerator, model, to=rows, optimizer=optimizer)
    with watch as rows.watch:
        seen = train(accelerator, model, optimizer, loader)
    check(rows, joined(seen, accumulate))
    whole = -(-BATCHES // accumulate)
    assert [row["step"] for row in rows.rows] == list(range(whole))
    assert rows.rows[-1]["batch"] == BATCHES - 1
    for row in rows.rows:
        assert row["factors/batch_size"] == row["gradient/count"]
    if accumulate != 2:  # else the last step is a mean of means of other sizes
        models = [model for model, _ in seen][::accumulate]
        check_steps_taken(rows, [*models, accelerator.unwrap_model(model)])
    assert "backward" not in vars(accelerator)
    assert not model._forward_pre_hooks
    train(accelerator, model, optimizer, loader)
    assert len(rows.rows) == whole


def test_training_is_bitwise_the_same():
    states = []
    for is_watched in (False, True):
        accelerator, model, optimizer, loader = prepared(gradient_accumulation_steps=2)
        if is_watched:
            fm.callbacks.watch(accelerator, model, to=Rows(), optimizer=optimizer)
        train(accelerator, model, optimizer, loader)
        states.append(model.state_dict())
    plain, watched = states
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_scaler_and_autocast():
    accelerator, model, _, loader = prepared(
        mixed_precision="bf16", gradient_accumulation_steps=2
    )
    accelerator.scaler = torch.amp.GradScaler("cpu")  # without a GPU there is none
    model.float()
    rows = Rows()
    rows.watch = fm.callbacks.watch(accelerator, model, to=rows)
    seen = train(accelerator, model, None, loader, torch.float32)
    # A scale forgotten is off by 2 or 65536, bfloat16 by some hundredths.
    check(rows, joined(seen, 2), rtol=0.1, atol=0.02)


def test_every_and_batch_size():
    accelerator, model, optimizer, loader = prepared()
    rows = Rows()
    rows.watch = fm.callbacks.watch(
        accelerator, model, to=rows, every=2, batch_size=lambda x: len(x)
    )
    seen = train(accelerator, model, optimizer, loader)
    check(rows, seen[::2])
    rows.watch.close()
    fm.callbacks.watch(accelerator, model, to=Rows(), batch_size=5)
    with pytest.raises(fm.CaptureError, match="No batch axis of size 5"):
        train(accelerator, model, optimizer, loader)


def test_two_watches_closed_in_any_order():
    accelerator, model, optimizer, loader = prepared()
    first, second = Rows(), Rows()
    first.watch = fm.callbacks.watch(accelerator, model, to=first)
    second.watch = fm.callbacks.watch(accelerator, model, to=second)
    seen = train(accelerator, model, optimizer, loader)
    first.watch.close()
    check(first, seen)
    seen += train(accelerator, model, optimizer, loader)
    second.watch.close()
    check(second, seen)
    assert len(first.rows) == BATCHES


def test_nothing_stays_behind_after_an_exception():
    accelerator, model, optimizer, loader = prepared()
    rows = Rows()
    rows.watch = fm.callbacks.watch(accelerator, model, to=rows)
    kept = accumulators(model)
    failing = fail_in_backward(model[2].weight, KeyboardInterrupt())
    x, y = dataset()[:]
    with pytest.raises(KeyboardInterrupt):
        accelerator.backward(losses(model, (x, y)).mean())
    failing.remove()
    assert isinstance(rows.watch._observer._probe._pass, Nothing)
    for _ in range(2):  # a hook left would take the second one for an error
        losses(model, (x, y)).mean().backward()
    del kept
    optimizer.zero_grad()
    check(rows, train(accelerator, model, optimizer, loader))


def test_loss_that_cannot_be_read_stops_training():
    accelerator, _, _, _ = prepared()
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    x, y = dataset()[:]
    watch = fm.callbacks.watch(accelerator, model, to=Rows())
    with pytest.raises(fm.CaptureError, match=r"[Bb]atch norm"):
        accelerator.backward(losses(model, (x, y)).mean())
    watch.close()
    rows = Rows()
    fm.callbacks.watch(accelerator, model, to=rows, on_error="warn")
    with pytest.warns(UserWarning, match="no gradient statistics"):
        accelerator.backward(losses(model, (x, y)).mean())
    assert model[0].weight.grad is not None
    assert not rows.rows


class Tracker(accelerate.tracking.GeneralTracker):
    name, requires_logging_directory = "memory", False

    def __init__(self):
        super().__init__()
        self.rows = []

    @property
    def tracker(self):
        return self.rows

    def log(self, values, step=None, **kwargs):
        self.rows.append((step, values))


def test_own_trackers_of_the_accelerator():
    tracker = Tracker()
    accelerator, model, optimizer, loader = prepared(log_with=tracker)
    with fm.callbacks.watch(accelerator, model, every=2):
        with pytest.warns(UserWarning, match="has no tracker"):
            train(accelerator, model, optimizer, loader)
        accelerator.init_trackers("project")
        train(accelerator, model, optimizer, loader)
    assert [step for step, _ in tracker.rows] == [4, 6]
    assert tracker.rows[0][1]["gradient/count"] == BATCH


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_two_processes():
    here = Path(__file__).parent
    paths = (here, here.parent, Path(fm.__file__).parents[1])
    shared = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(here / "two_processes.py")],
            env=shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all("checked" in output for output in outputs), "\n".join(outputs)


def test_wrong_arguments(monkeypatch):
    accelerator, model, _, _ = prepared()
    with pytest.raises(TypeError, match="pass the one to watch"):
        fm.callbacks.watch(accelerator)
    fm.callbacks.watch(accelerator, nn.Linear(2, 2), to=Rows())
    with pytest.raises(ValueError, match="called before the model"):
        accelerator.backward(losses(model, dataset()[:]).mean())
    fsdp = accelerate.DistributedType.FSDP
    monkeypatch.setattr(type(accelerator), "distributed_type", fsdp)
    with pytest.raises(ValueError, match="Under FSDP no process"):
        fm.callbacks.watch(accelerator, model)


def test_the_optimizer_within_is_the_one_that_is_named():
    accelerator, model, _, loader = prepared()
    adam = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.5)
    optimizer = accelerator.prepare(adam)
    rows = Rows()
    rows.watch = fm.callbacks.watch(accelerator, model, to=rows, optimizer=optimizer)
    with pytest.warns(UserWarning, match="no temperature: Adam rescales"):
        train(accelerator, model, optimizer, loader)
    assert rows.rows[0]["factors/weight_decay"] == 0.5
    assert rows.rows[0]["factors/momentum"] == 0.9


def test_every_counts_steps_and_state_goes_on(tmp_path):
    accelerator, model, optimizer, loader = prepared(gradient_accumulation_steps=2)
    rows, more = Rows(), Rows()
    first = fm.callbacks.watch(accelerator, model, to=rows, every=2)
    train(accelerator, model, optimizer, loader)
    assert [(row["step"], row["batch"]) for row in rows.rows] == [(0, 1)]
    first.close()
    accelerator.register_for_checkpointing(first)
    accelerator.save_state(str(tmp_path))
    second = fm.callbacks.watch(accelerator, model, to=more, every=2)
    accelerator._custom_objects[:] = [second]
    accelerator.load_state(str(tmp_path))
    train(accelerator, model, optimizer, loader)
    assert [(row["step"], row["batch"]) for row in more.rows] == [(2, 5)]


def mixed(model, batch):
    """Each sample's loss depends on all, so that there are no gradients of samples."""
    return losses(lambda x: model(x) / model(x).std(0), batch)


def one_pass(accelerator, model, batch, optimizer=None, of=losses):
    with accelerator.accumulate(model):
        accelerator.backward(of(model, batch).mean())
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()


def test_a_state_from_the_middle_of_a_step_begins_it_anew():
    accelerator, model, optimizer, _ = prepared(gradient_accumulation_steps=3)
    batches = [part[:] for part in torch.utils.data.random_split(dataset(), [8, 8, 8])]
    rows, more = Rows(), Rows()
    first = fm.callbacks.watch(accelerator, model, to=rows, every=2)
    one_pass(accelerator, model, batches[0], optimizer)
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    assert (state["steps"], state["batches"]) == (0, 1)
    second = fm.callbacks.watch(accelerator, model, every=2, to=more)
    second.load_state_dict(state)
    for batch in batches[1:]:
        one_pass(accelerator, model, batch, optimizer)
    (row,) = more.rows
    assert (row["step"], row["batch"], row["gradient/count"]) == (0, 2, 16)
    assert not rows.rows


def test_largest_samples_name_their_batch(tmp_path):
    accelerator, model, optimizer, loader = prepared(
        UNEVEN, gradient_accumulation_steps=2
    )
    with fm.callbacks.watch(accelerator, model, to=tmp_path) as watch:
        seen = train(accelerator, model, optimizer, loader)
        norms = watch.stats.sq_norms.sqrt()  # of the last step: six samples and four
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 2
    found = json.loads(lines[-1])["samples"]
    assert {sample["microbatch"] for sample in found} == {0, 1}
    for sample in found:
        at = sample["microbatch"] * BATCH + sample["index"]
        assert sample["norm"] == pytest.approx(norms[at].item())
    assert len(seen[-1][1][0]) == 4


@pytest.mark.parametrize("unreadable", [0, 1])
def test_a_step_with_a_batch_that_cannot_be_read_has_no_row(unreadable):
    accelerator, model, optimizer, loader = prepared(gradient_accumulation_steps=2)
    rows = Rows()
    rows.watch = fm.callbacks.watch(accelerator, model, to=rows, on_error="warn")
    batch = dataset()[:]
    with pytest.warns(UserWarning, match="no gradient statistics") as warned:
        for at in range(2):
            of = mixed if at == unreadable else losses
            one_pass(accelerator, model, batch, optimizer, of)
    assert len(warned) == 1
    assert not rows.rows
    check(rows, joined(train(accelerator, model, optimizer, loader), 2))
    assert [row["step"] for row in rows.rows] == [1, 2]


def test_a_pass_that_an_exception_ended_leaves_its_step_without_a_row():
    accelerator, model, optimizer, loader = prepared(gradient_accumulation_steps=3)
    rows = Rows()
    rows.watch = fm.callbacks.watch(accelerator, model, to=rows)
    batch = dataset()[:]
    failing = fail_in_backward(model[2].weight, RuntimeError("mine"))
    with pytest.raises(RuntimeError, match="mine"):
        one_pass(accelerator, model, batch)
    failing.remove()
    one_pass(accelerator, model, batch)
    with pytest.warns(UserWarning, match="did not come to its end"):
        one_pass(accelerator, model, batch, optimizer)
    assert not rows.rows
    check(rows, joined(train(accelerator, model, optimizer, loader), 3))


def test_an_optimizer_that_steps_in_between_is_announced():
    accelerator, model, _, _ = prepared(gradient_accumulation_steps=2)
    bare = torch.optim.SGD(model.parameters(), lr=0.1)  # which accelerate cannot hold
    rows = Rows()
    rows.watch = fm.callbacks.watch(accelerator, model, to=rows)
    one_pass(accelerator, model, dataset()[:], bare)
    with pytest.warns(UserWarning, match="changed after a backward pass of a step"):
        one_pass(accelerator, model, dataset()[:], bare)
    assert [row["gradient/count"] for row in rows.rows] == [BATCH * BATCHES]


def test_several_losses_a_batch_have_rows_only_without_accumulation():
    for accumulate in (1, 2):
        accelerator, model, _, _ = prepared(gradient_accumulation_steps=accumulate)
        rows = Rows()
        watch = fm.callbacks.watch(accelerator, model, to=rows)
        with watch as rows.watch, accelerator.accumulate(model):
            accelerator.backward(losses(model, dataset()[:]).mean())
            second = losses(model, dataset()[:]).mean()
            if accumulate == 1:
                accelerator.backward(second)
                assert len(rows.rows) == 2
            else:
                with pytest.raises(fm.CaptureError, match="several backward passes"):
                    accelerator.backward(second)
                assert not rows.rows
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def test_a_step_that_the_scaler_skips_has_a_row():
    accelerator, model, _, _ = prepared(gradient_accumulation_steps=2)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    optimizer = accelerate.optimizer.AcceleratedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), scaler=accelerator.scaler
    )
    x, y = dataset()[:]
    rows = Rows()
    with fm.callbacks.watch(accelerator, model, to=rows):
        for factor in (1, torch.inf, 1, 1):
            one_pass(accelerator, model, (x * factor, y), optimizer)
    assert [row["is_finite"] for row in rows.rows] == [False, True]
    assert [row["step"] for row in rows.rows] == [0, 1]


def test_accumulation_is_the_librarys():
    accelerator, model, _, _ = prepared()
    with pytest.raises(ValueError, match="leave accumulate out"):
        fm.callbacks.watch(accelerator, model, accumulate=2)
    with pytest.raises(ValueError, match="Leave process_group out"):
        fm.callbacks.watch(accelerator, model, process_group="world")


def test_closing_closes_the_files(tmp_path):
    accelerator, model, optimizer, loader = prepared()
    monitor = fm.monitor.Monitor(fm.monitor.RunFolder(tmp_path / "theirs"))
    for to, left in ((tmp_path / "a", 0), (monitor, 1)):  # its owner closes that one
        with fm.callbacks.watch(accelerator, model, to=to, optimizer=optimizer):
            train(accelerator, model, optimizer, loader)
            assert "rows.jsonl" in open_files(tmp_path)
        assert len(open_files(tmp_path)) == left
    monitor.close()
