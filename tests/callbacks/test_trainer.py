"""watch(trainer) in real training, against single-sample gradients."""

import copy
import json

import pytest
import torch
import transformers
from read_logs import history, scalars
from torch.nn.functional import cross_entropy
from training import (
    Rows,
    accumulators,
    check,
    check_steps_taken,
    fail_in_backward,
    joined,
    open_files,
)

import fastminima as fm
from fastminima.capture.session.states import Nothing

pytestmark = pytest.mark.filterwarnings("ignore")

# transformers computes this loss in float32, whatever the model is in.
FLOAT32 = {"rtol": 2e-5, "atol": 1e-6}
VOCABULARY, LENGTH, BATCH = 20, 6, 3


def gpt2():
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=8,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    return transformers.GPT2LMHeadModel(config)


def sequences(count=12, ignored=0):
    """Token sequences; of each, up to so many labels are ignored."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for n in range(count):
        ids = torch.randint(0, VOCABULARY, (LENGTH,), generator=generator)
        labels = ids.clone()
        labels[: 1 + n % (ignored + 1)] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


class Trainer(transformers.Trainer):
    """Remembers the model, the inputs and the divisor of the loss of every batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def compute_loss(self, model, inputs, num_items_in_batch=None, **kwargs):
        batch = (inputs["input_ids"], inputs["labels"])
        parts = self.current_gradient_accumulation_steps
        self.seen.append((copy.deepcopy(self.model), batch, num_items_in_batch, parts))
        return super().compute_loss(
            model, inputs, num_items_in_batch=num_items_in_batch, **kwargs
        )


def trainer(folder, cls=Trainer, data=None, model=None, **options):
    options = {"num_train_epochs": 1, "optim": "sgd", "report_to": [], **options}
    args = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    return cls(model or gpt2(), args, train_dataset=data or sequences())


def sums_of_tokens(model, batch):
    """Each sample's summed token losses."""
    ids, labels = batch
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    losses = cross_entropy(logits, labels[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).sum(1)


def check_tokens(rows, seen, accumulate=1):
    """A sample's loss is its part of the step's, times the samples of the step."""
    steps = joined([one[:2] for one in seen], accumulate)
    assert len(rows.rows) == len(steps)
    for i, (model, batch) in enumerate(steps):
        part = Rows()
        part.rows, part.stats = rows.rows[i : i + 1], rows.stats[i : i + 1]
        factor = len(batch[0]) / int(seen[i * accumulate][2])
        check(
            part,
            [(model, batch)],
            lambda m, b, f=factor: sums_of_tokens(m, b) * f,
            **FLOAT32,
        )


def starts(one, accumulate=1):
    """The models at the beginning of each step of a Trainer, and at the end."""
    return [*(model for model, *_ in one.seen[::accumulate]), one.model]


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_rows_are_those_of_single_samples(tmp_path, accumulate):
    """With two batches a step the last ones differ in size, with three one is left."""
    rows = Rows()
    options = {"gradient_accumulation_steps": accumulate, "max_grad_norm": 0.0}
    one = trainer(tmp_path, data=sequences(11, ignored=3), **options)
    with fm.callbacks.watch(one, to=rows) as rows.watch:
        one.train()
    assert {int(parts) for *_, parts in one.seen} <= {accumulate, 1}
    check_tokens(rows, one.seen, accumulate)
    assert [row["step"] for row in rows.rows] == list(range(len(rows.rows)))
    for row in rows.rows:
        assert row["factors/batch_size"] == row["gradient/count"]
        assert row["factors/temperature"] > 0
    check_steps_taken(rows, starts(one, accumulate), 1e-3)


class Regression(torch.nn.Module):
    """A model whose loss is a plain mean, which the Trainer divides itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Linear(4, 1).double()

    def forward(self, x, labels):
        return {"loss": self.losses(x, labels).mean()}

    def losses(self, x, labels):
        return (self.net(x).squeeze(1) - labels).square()


def test_loss_that_the_trainer_divides(tmp_path):
    class Seeing(transformers.Trainer):
        seen = ()

        def compute_loss(self, model, inputs, **kwargs):
            batch = (inputs["x"], inputs["labels"])
            self.seen = [*self.seen, (copy.deepcopy(model), batch)]
            return super().compute_loss(model, inputs, **kwargs)

    x = torch.randn(12, 4, dtype=torch.float64)
    data = [{"x": row, "labels": row.sum()} for row in x[:-1]]  # an uneven step
    rows = Rows()
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}
    one = trainer(tmp_path, Seeing, data, Regression(), **options)
    with fm.callbacks.watch(one, to=rows) as rows.watch:
        one.train()
    check(rows, joined(one.seen, 2), lambda model, batch: model.losses(*batch))


def test_training_is_bitwise_the_same(tmp_path):
    states = []
    for is_watched in (False, True):
        one = trainer(tmp_path, gradient_accumulation_steps=2)
        if is_watched:
            fm.callbacks.watch(one, to=Rows())
        one.train()
        states.append((one.model.state_dict(), torch.get_rng_state()))
    (plain, plain_rng), (watched, watched_rng) = states
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert torch.equal(plain_rng, watched_rng)


def test_every_and_a_second_training(tmp_path):
    rows = Rows()
    one = trainer(tmp_path)
    rows.watch = fm.callbacks.watch(one, to=rows, every=3)
    one.train()
    one.train()
    assert [row["batch"] for row in rows.rows] == [0, 3, 6]
    check_tokens(rows, one.seen[::3])


def test_adaptive_optimizer_has_no_temperature(tmp_path):
    one = trainer(tmp_path, optim="adamw_torch")
    rows = Rows()
    fm.callbacks.watch(one, to=rows)
    with pytest.warns(UserWarning, match="no ratio and no temperature: .*rescales"):
        one.train()
    assert {row["factors/learning_rate"] for row in rows.rows} == {0.1}
    assert not any("factors/temperature" in row for row in rows.rows)


def test_half_precision(tmp_path):
    rows = Rows()
    one = trainer(tmp_path, bf16=True)
    with fm.callbacks.watch(one, to=rows) as rows.watch:
        one.train()
    seen = [(model, batch) for model, batch, *_ in one.seen]
    # All labels count, so each sample's loss is its mean; bfloat16 has 8 bits.
    tolerance = {"rtol": 0.1, "atol": 0.02}
    check(rows, seen, lambda m, b: sums_of_tokens(m, b) / (LENGTH - 1), **tolerance)


def test_what_the_trainer_reports_to(tmp_path):
    one = trainer(tmp_path, logging_strategy="no")
    fm.callbacks.watch(one, every=2)
    one.train()
    logged = [row for row in one.state.log_history if "gradient/signal" in row]
    assert [row["step"] for row in logged] == [0, 2]
    assert all("gradient/loss" in row and "loss" not in row for row in logged)


def test_all_loggers_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    board, lines = tmp_path / "board", tmp_path / "x.jsonl"
    with fm.monitor.Monitor(
        fm.monitor.TensorBoard(board),
        fm.monitor.WandB("project", mode="offline", dir=str(tmp_path)),
        lines,
    ) as monitor:
        one = trainer(tmp_path)
        fm.callbacks.watch(one, to=monitor)
        one.train()
    rows = fm.monitor.read(lines)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    without = "gradient/noise_scale_high"  # infinite, which JSON does not have
    for row, other in zip(rows, history(tmp_path), strict=True):
        assert row.pop(without) != other.pop(without)
        assert row == other
    for name, events in scalars(board).items():
        assert [step for step, _ in events] == [0, 1, 2, 3]
        if name != without:
            values = [value for _, value in events]
            assert values == pytest.approx([float(row[name]) for row in rows])


def test_close_leaves_the_trainer_as_it_was(tmp_path):
    one = trainer(tmp_path)
    watch = fm.callbacks.watch(one, to=tmp_path / "x.jsonl")
    one.train()
    assert "backward" not in vars(one.accelerator)
    watch.close()
    assert "training_step" not in vars(one)
    lines = (tmp_path / "x.jsonl").read_text().splitlines()
    assert all(json.loads(line)["is_finite"] for line in lines)
    one.train()
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == len(lines) == 4


def test_no_file_stays_open_and_a_second_training_goes_on(tmp_path):
    one = trainer(tmp_path)
    fm.callbacks.watch(one, to=tmp_path / "runs")  # the one line
    for trained in (1, 2):
        one.train()
        assert open_files(tmp_path / "runs") == []
        lines = (tmp_path / "runs" / "rows.jsonl").read_text().splitlines()
        assert len(lines) == 4 * trained


def test_nothing_stays_behind_after_an_exception(tmp_path):
    one = trainer(tmp_path)
    rows = Rows()
    rows.watch = fm.callbacks.watch(one, to=rows)
    kept = accumulators(one.model)
    failing = fail_in_backward(one.model.transformer.ln_f.bias, RuntimeError("mine"))
    with pytest.raises(RuntimeError, match="mine"):
        one.train()
    failing.remove()
    assert "backward" not in vars(one.accelerator)
    assert isinstance(rows.watch._observer._probe._pass, Nothing)
    batch = sequences()[0]["input_ids"][None]
    for _ in range(2):  # a hook left would take the second one for an error
        one.model(input_ids=batch, labels=batch).loss.backward()
    del kept
    one.model.zero_grad()
    one.seen.clear()
    one.train()
    check_tokens(rows, one.seen)


def test_backward_that_is_not_the_accelerators(tmp_path):
    class Own(transformers.Trainer):
        def training_step(self, model, inputs, *args):
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            loss.backward()
            return loss.detach()

    one = trainer(tmp_path, Own)
    fm.callbacks.watch(one, to=Rows())
    with pytest.raises(fm.CaptureError, match="not made by the call that is watched"):
        one.train()


def test_wrong_arguments(tmp_path):
    one = trainer(tmp_path)
    with pytest.raises(TypeError, match="leave them out"):
        fm.callbacks.watch(one, one.model)
    with pytest.raises(TypeError, match="Cannot watch Linear"):
        fm.callbacks.watch(torch.nn.Linear(2, 2))
    one.args._n_gpu = 2
    with pytest.raises(ValueError, match="DataParallel on 2 GPUs"):
        fm.callbacks.watch(one)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_model_that_does_not_divide_its_loss_under_accumulation(tmp_path, accumulate):
    """BERT takes the number of tokens and does not use it; nor does the Trainer."""
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForSequenceClassification(config)
    data = [
        {"input_ids": row["input_ids"], "labels": row["input_ids"][0] % 3}
        for row in sequences()
    ]
    rows = Rows()
    options = {"gradient_accumulation_steps": accumulate, "max_grad_norm": 0.0}
    one = trainer(tmp_path, data=data, model=model, **options)
    with fm.callbacks.watch(one, to=rows) as rows.watch:
        one.train()

    def losses(model, batch):
        ids, labels = batch
        return cross_entropy(model(input_ids=ids).logits, labels, reduction="none")

    check(rows, joined([one[:2] for one in one.seen], accumulate), losses, **FLOAT32)
    check_steps_taken(rows, starts(one, accumulate), 1e-3)


def test_every_counts_steps_of_the_optimizer(tmp_path):
    rows = Rows()
    one = trainer(tmp_path, gradient_accumulation_steps=2)
    rows.watch = fm.callbacks.watch(one, to=rows, every=2)
    one.train()
    assert [(row["step"], row["batch"]) for row in rows.rows] == [(0, 1)]


def test_resuming_from_a_checkpoint_goes_on(tmp_path):
    """Running averages and counters are in the Trainer's own checkpoint."""
    smoothed = []
    for resumes in (False, True):
        rows = Rows()
        one = trainer(tmp_path)
        one.args.save_strategy, one.args.save_steps = "steps", 2
        fm.callbacks.watch(one, to=rows)
        checkpoint = str(tmp_path / "checkpoint-2") if resumes else None
        one.train(resume_from_checkpoint=checkpoint)
        smoothed.append([row["gradient/noise_scale_smoothed"] for row in rows.rows])
        batches = [row["batch"] for row in rows.rows]
    whole, resumed = smoothed
    assert batches == [2, 3]
    assert resumed == pytest.approx(whole[2:])
    assert whole[3] != pytest.approx(whole[0])
