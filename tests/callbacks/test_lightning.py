"""LightningProbe in real fits, against single-sample gradients."""

import copy
import json
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from training import (
    BATCH,
    BATCHES,
    TRAINED,
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

pytestmark = pytest.mark.filterwarnings("ignore")


class Module(pl.LightningModule):
    """Remembers the model and the batch of every training step."""

    def __init__(self, returns=None):
        super().__init__()
        self.net = classifier()
        self.returns, self.seen = returns, []

    def training_step(self, batch, batch_idx):
        self.seen.append((copy.deepcopy(self.net), batch))
        loss = losses(self.net, batch).mean()
        return {"loss": loss, "more": 1} if self.returns == "dict" else loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


def fit(module, *callbacks, shuffle=False, samples=BATCH * BATCHES, **options):
    options = {"max_epochs": 1, "logger": False, **options}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, DataLoader(dataset(samples), BATCH, shuffle=shuffle))
    return trainer


def probe(**options):
    rows = Rows()
    callback = rows.watch = fm.callbacks.LightningProbe(rows, **options)
    return callback, rows


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("returns", [None, "dict"])
def test_rows_are_those_of_single_samples(accumulate, returns):
    """With two batches a step the last ones differ in size, with three one is left."""
    callback, rows = probe()
    module = Module(returns)
    fit(module, callback, samples=UNEVEN, accumulate_grad_batches=accumulate)
    check(rows, joined(module.seen, accumulate))
    last = [(i, min(accumulate * (i + 1), BATCHES) - 1) for i in range(len(rows.rows))]
    assert [(row["step"], row["batch"]) for row in rows.rows] == last
    for (_, batch), row in zip(last, rows.rows, strict=True):
        assert row["factors/batch_size"] == row["gradient/count"]
        share = (batch % accumulate + 1) / accumulate  # of its batches that there were
        variance = row["gradient/covariance_trace"] / TRAINED
        ratio = 0.1 * share / (1 - 0.5) / row["gradient/count"]
        assert row["factors/temperature"] == pytest.approx(ratio * variance / 2)


class Plain(Module):
    """Has an optimizer whose steps are gradients."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_rows_say_the_steps_that_are_taken():
    """With three batches a step, the last one, which Lightning divides by three too."""
    callback, rows = probe()
    module = Plain()
    fit(module, callback, samples=UNEVEN, accumulate_grad_batches=3)
    models = [model for model, _ in module.seen][::3]
    check_steps_taken(rows, [*models, module.net])


def test_an_epoch_that_is_cut_short():
    callback, rows = probe()
    module = Plain()
    options = {"limit_train_batches": 3, "max_epochs": 2}
    fit(module, callback, accumulate_grad_batches=2, **options)
    epochs = module.seen[:3], module.seen[3:]
    check(rows, [step for epoch in epochs for step in joined(epoch, 2)])


def test_a_last_batch_without_a_loss():
    class Skipping(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 3 == 2 else loss

    callback, rows = probe()
    module = Skipping()
    fit(module, callback, samples=4 * UNEVEN, accumulate_grad_batches=3)
    seen = [(i, one) for i, one in enumerate(module.seen) if i % 3 != 2]
    check(rows, joined([one for _, one in seen], 2))
    models = [one for i, (one, _) in seen if i % 3 == 0]
    check_steps_taken(rows, [*models, module.net])


def test_training_is_bitwise_the_same():
    states = []
    for callbacks in ((), (probe()[0],)):
        torch.manual_seed(3)
        module = Module()
        fit(module, *callbacks, shuffle=True, max_epochs=2, accumulate_grad_batches=2)
        states.append((module.state_dict(), torch.get_rng_state()))
    (plain, plain_rng), (probed, probed_rng) = states
    assert all(torch.equal(plain[name], probed[name]) for name in plain)
    assert torch.equal(plain_rng, probed_rng)


def test_every_counts_batches_over_fits():
    callback, rows = probe(every=3)
    module = Module()
    fit(module, callback)
    fit(module, callback)
    assert [row["batch"] for row in rows.rows] == [0, 3, 6]
    check(rows, module.seen[::3])


class Narrow(Module):
    def __init__(self):
        super().__init__()
        self.net.float()

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0].float(), batch[1]), batch_idx)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision(precision):
    scaler = torch.amp.GradScaler("cpu") if precision == "16-mixed" else None
    plugin = pl.plugins.MixedPrecision(precision, "cpu", scaler)
    callback, rows = probe()
    module = Narrow()
    fit(module, callback, plugins=[plugin], accumulate_grad_batches=2)
    # A scale forgotten is off by 2 or 65536, bfloat16 by some hundredths.
    check(rows, joined(module.seen, 2), rtol=0.1, atol=0.02)


class Manual(Module):
    """Two backward passes a batch, by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.seen.append((copy.deepcopy(self.net), batch))
            self.manual_backward(losses(self.net, batch).mean())
            optimizer.step()


def test_manual_optimization_has_a_row_for_each_backward_pass():
    callback, rows = probe(every=2)
    module = Manual()
    fit(module, callback)
    check(rows, [module.seen[i] for i in (0, 1, 4, 5)])
    assert [row["backward"] for row in rows.rows] == [0, 1, 0, 1]


def test_batch_size_by_a_function():
    class Nested(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["data"], batch_idx)

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return {"weights": torch.ones(2), "data": batch}

    callback, rows = probe(batch_size=lambda batch: len(batch["data"][0]))
    module = Nested()
    fit(module, callback)
    check(rows, module.seen)
    with pytest.raises(fm.CaptureError, match="No batch axis of size 2"):
        fit(Nested(), fm.callbacks.LightningProbe(Rows()))


class Mixing(Module):
    def __init__(self):
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(5).double())


def test_capture_error_stops_the_first_step_or_is_announced(tmp_path):
    module = Mixing()
    with pytest.raises(fm.CaptureError, match=r"[Bb]atch norm"):
        fit(module, probe()[0])
    assert len(module.seen) == 1
    callback, rows = probe(on_error="warn")
    with pytest.warns(UserWarning, match="no gradient statistics: .*[Bb]atch"):
        fit(Mixing(), callback)
    assert not rows.rows
    callback, rows = probe(batchnorm="rows")
    fit(Mixing(), callback)
    assert len(rows.rows) == BATCHES


@pytest.mark.parametrize("error", [RuntimeError("mine"), SystemExit()])
def test_nothing_stays_behind_after_an_exception(error):
    callback, rows = probe()
    module = Module()
    kept = accumulators(module.net)
    failing = fail_in_backward(module.net[2].weight, error)
    with pytest.raises(type(error)):
        fit(module, callback)
    failing.remove()
    assert isinstance(callback._observer._probe._pass, Nothing)
    for _ in range(2):  # a hook left would take the second one for an error
        losses(module.net, dataset()[:]).mean().backward()
    del kept
    module.seen.clear()
    fit(module, callback)
    check(rows, module.seen)


def test_parameters_that_thaw_between_fits_are_tracked():
    callback, rows = probe()
    module = Module()
    module.net[0].requires_grad_(False)
    fit(module, callback)
    assert rows.stats[-1].parameter_count == 18
    module.net[0].requires_grad_(True)
    fit(module, callback)
    assert rows.stats[-1].parameter_count == TRAINED


def test_own_loggers_of_the_trainer(tmp_path):
    logger = pl.loggers.CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    fit(Module(), fm.callbacks.LightningProbe(every=2), logger=logger)
    lines = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    header = lines[0].split(",")
    assert {"gradient/covariance_trace", "factors/temperature", "step"} <= set(header)
    assert len(lines) == 3
    with pytest.warns(UserWarning, match="has no logger"):
        fit(Module(), fm.callbacks.LightningProbe())


def test_path_gets_json_lines_of_two_fits(tmp_path):
    callback = fm.callbacks.LightningProbe(tmp_path / "x.jsonl")
    for _ in range(2):
        fit(Module(), callback)
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").open()]
    assert [row["batch"] for row in rows] == list(range(2 * BATCHES))


def test_sharded_parameters_are_refused():
    class FSDPStrategy:
        pass

    class Trainer:
        strategy = FSDPStrategy()

    with pytest.raises(ValueError, match="FSDPStrategy shards the parameters"):
        fm.callbacks.LightningProbe().on_fit_start(Trainer(), None)


@pytest.mark.parametrize("bad", [{"every": 0}, {"every": 1.5}, {"on_error": "ignore"}])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        fm.callbacks.LightningProbe(**bad)


def run(code):
    code = "import sys, fastminima as fm\n" + code
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_other_package_name():
    code = (
        "import pytorch_lightning as pl\n"
        "callback = fm.callbacks.LightningProbe()\n"
        "assert isinstance(callback, pl.Callback)\n"
        "assert isinstance(callback, fm.callbacks.LightningProbe)\n"
        "assert 'lightning.pytorch' not in sys.modules"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_not_installed():
    code = (
        "sys.modules |= {'lightning': None, 'pytorch_lightning': None}\n"
        "fm.callbacks.LightningProbe()"
    )
    error = run(code).stderr.splitlines()[-1]
    assert error.startswith("ImportError: LightningProbe needs lightning")
    assert "`pip install lightning`" in error


def test_every_counts_steps_of_the_optimizer():
    callback, rows = probe(every=2)
    fit(Module(), callback, accumulate_grad_batches=2)
    assert [(row["step"], row["batch"]) for row in rows.rows] == [(0, 1)]


def test_state_is_that_of_the_averages():
    first, rows = probe()
    fit(Module(), first)
    second, more = probe()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    fit(Module(), second)
    assert more.rows[0]["batch"] == len(rows.rows)
    third, alone = probe()
    fit(Module(), third)
    name = "gradient/noise_scale_smoothed"
    assert more.rows[0][name] != pytest.approx(alone.rows[0][name])


def test_no_file_stays_open(tmp_path):
    fit(Module(), fm.callbacks.LightningProbe(tmp_path / "a"))
    assert len((tmp_path / "a" / "rows.jsonl").read_text().splitlines()) == BATCHES
    assert open_files(tmp_path) == []
