"""Models of transformers and timm against the float64 loop over single samples.

`python tests/capture/test_transformers.py`, with the repository and tests/ on
PYTHONPATH, writes what it finds into docs/coverage.md.
"""

import dataclasses
import importlib.util
import re
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from oracles import flat, single_sample_gradients
from timm_models import TIMM
from transformers_models import (
    ENCODER,
    LISTED,
    MORE,
    NO_DROPOUT,
    hearing,
    language,
    t5,
    twin,
)

import fastminima as fm
from fastminima.capture.reading import attempt
from fastminima.capture.session import fused

DOCUMENT = Path(__file__).parents[2] / "docs" / "coverage.md"
BEGIN, END = "<!-- table:transformers -->", "<!-- /table -->"
HAS_TIMM = importlib.util.find_spec("timm") is not None
MODELS = {f"{zoo.name}, {zoo.what}": zoo for zoo in (*LISTED, *MORE, *TIMM)}

# |g_n| of one parameter, relative to the float64 one. A parameter's gradient counts as
# no less than this part of the sample's whole gradient: a bias before a softmax or a
# normalisation has nothing but rounding for one.
BOUND, NEGLIGIBLE = 1e-5, 1e-3


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one model."""

    model_class: str
    parameters: int
    rules: tuple[str, ...]
    universal: int
    error: float
    rounding: float  # the same of autograd's own gradients in float32


@cache
def outcome(label):
    model, batch = MODELS[label].make()
    losses = MODELS[label].losses
    want = norms(single_sample_gradients(twin(model), losses, batch))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probe = fm.GradientProbe(model, per_parameter=True)
        audit = probe.audit(losses(model, batch), samples=2)
        assert audit.ok, f"{label}\n{audit}"
        stats = probe.backward(losses(model, batch))
    got = {k: v.double().sqrt() for k, v in stats.sq_norms_by_parameter.items()}
    rules = sorted({rule for row in audit.rows for rule in row.rules})
    assert stats.is_finite
    for name, exact in want.items():
        assert name in got or not exact.any(), f"{label}: {name} is missing"
    return Outcome(
        type(model).__name__,
        len(audit.rows),
        tuple(rule for rule in rules if rule != "universal"),
        sum("universal" in row.rules for row in audit.rows),
        worst(got, want),
        worst(norms(float32_gradients(model, losses(model, batch))), want),
    )


def norms(gradients):
    """`{name: [N]}` of `{name: [N, *shape]}`."""
    return {k: g.double().reshape(len(g), -1).norm(dim=1) for k, g in gradients.items()}


def float32_gradients(model, losses):
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = {name: [] for name in named}
    for loss in losses:
        grads = torch.autograd.grad(
            loss, list(named.values()), retain_graph=True, allow_unused=True
        )
        for (name, p), g in zip(named.items(), grads, strict=True):
            found[name].append(torch.zeros_like(p) if g is None else g)
    return {name: torch.stack(gs) for name, gs in found.items()}


def worst(got, want):
    """Worst relative error of a norm over parameters and samples."""
    whole = torch.stack(list(want.values())).square().sum(0).sqrt()
    return max(
        ((got[name] - want[name]).abs() / want[name].maximum(NEGLIGIBLE * whole))
        .max()
        .item()
        for name in got
    )


def allowed(rounding):
    """The bound, or twice autograd's own error in float32 where that is larger.

    A norm is taken of the same rounded activations in either way, so neither can be
    better than they are; timm's Mixer, with 512 features and weights off their initial
    values, has 1e-5 of that.
    """
    return max(BOUND, 2 * rounding)


def needs_timm(label):
    if label.startswith("timm") and not HAS_TIMM:
        pytest.skip("timm is not installed (pip install --no-deps timm)")


@pytest.mark.parametrize("label", MODELS)
def test_exact(label):
    needs_timm(label)
    found = outcome(label)
    print(f"{label}: {found.error:.1e}, autograd in float32: {found.rounding:.1e}")
    assert found.error <= allowed(found.rounding)
    if MODELS[label] in LISTED:
        assert found.universal == 0


@pytest.mark.parametrize("name", ["GPT-2", "T5", "ViT", "ConvNeXt", "Mamba", "Mixtral"])
def test_second_moments_and_gram(name):
    """In float64, where nothing but the rules can be wrong."""
    (zoo,) = (zoo for zoo in LISTED if zoo.name == name)
    model, batch = zoo.make()
    model = twin(model).double()
    batch = [t.double() if t.is_floating_point() else t for t in batch]
    want = single_sample_gradients(model, zoo.losses, batch)
    stats = fm.GradientProbe(model, measure=("second_moments", "gram")).backward(
        zoo.losses(model, batch)
    )
    # Some of these models compute in float32 inside, whatever they are given.
    close = {"rtol": 1e-5, "atol": 1e-8}
    gradients = flat(want)
    torch.testing.assert_close(stats.gram, gradients @ gradients.T, **close)
    for key, moments in stats.second_moments.items():
        exact = want[key].square().mean(0)
        scale = exact.max().clamp_min(1e-12)
        torch.testing.assert_close(moments / scale, exact / scale, rtol=1e-4, atol=1e-6)


# One sample; as many as heads and experts, tokens, patches with the class token.
@pytest.mark.parametrize("batch, time", [(1, 7), (4, 4), (7, 7), (10, 7)])
@pytest.mark.parametrize("zoo", LISTED, ids=lambda zoo: zoo.name)
def test_sizes_that_coincide(zoo, batch, time):
    model, inputs = zoo.make(batch, time)
    want = norms(single_sample_gradients(twin(model), zoo.losses, inputs))
    probe = fm.GradientProbe(model, per_parameter=True)
    singles = float32_gradients(model, zoo.losses(model, inputs))
    for _ in range(2):  # measured, and remembered
        stats = probe.backward(zoo.losses(model, inputs))
        got = {k: v.double().sqrt() for k, v in stats.sq_norms_by_parameter.items()}
        assert worst(got, want) <= allowed(worst(norms(singles), want))


def agrees_with_autograd(probe, model, losses):
    want = norms(float32_gradients(model, losses))
    stats = probe.backward(losses)
    got = {k: v.double().sqrt() for k, v in stats.sq_norms_by_parameter.items()}
    assert worst(got, want) <= BOUND


@pytest.mark.parametrize(
    "label",
    [label for label in MODELS if "experts" in label],
)
def test_experts_are_measured_once(label, monkeypatch):
    """Tokens go to other experts in each step."""
    calls = []
    measure = attempt.measure_samples

    def counting(*args, **options):
        calls.append(args)
        return measure(*args, **options)

    monkeypatch.setattr(attempt, "measure_samples", counting)
    model, _ = MODELS[label].make()
    probe = fm.GradientProbe(model, per_parameter=True)
    for seed in range(4):
        torch.manual_seed(seed)
        batch = MODELS[label].inputs(5, 9)  # other than heads and experts
        agrees_with_autograd(probe, model, MODELS[label].losses(model, batch))
    assert len(calls) == 1


def spoken_to(config, model):
    """As in fine-tuning: dropout, and spans of the input masked."""
    options = dict.fromkeys(("mask_time_prob", "mask_feature_prob"), 0.3)
    made = hearing(config, model, **options, mask_time_length=2, mask_feature_length=2)
    return made.train()


TRAINED = {
    "BERT": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(**ENCODER | dict.fromkeys(NO_DROPOUT, 0.2))
    ),
    "T5": lambda: t5(dropout_rate=0.2),
    "wav2vec 2.0": lambda: spoken_to(
        hf.Wav2Vec2Config, hf.Wav2Vec2ForSequenceClassification
    ),
}


@pytest.mark.parametrize("name", TRAINED)
def test_dropout(name):
    """Other elements in each step and sample: the graph itself is the oracle."""
    (zoo,) = (zoo for zoo in MODELS.values() if zoo.name == name)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - it masks spans with this generator
    model, batch = TRAINED[name](), zoo.inputs(4, 7)
    probe = fm.GradientProbe(model, per_parameter=True)
    for _ in range(3):
        agrees_with_autograd(probe, model, zoo.losses(model, batch))


HEADS = {
    "GPT-2": "transformer.wte.weight",
    "T5": "shared.weight",
    "Gemma 2": "model.embed_tokens.weight",
    "BART": "model.shared.weight",
}


@pytest.mark.parametrize("name", HEADS)
def test_tied_heads_in_fused_mode(name, monkeypatch):
    (zoo,) = (zoo for zoo in MODELS.values() if zoo.name == name)
    model, batch = zoo.make()
    zoo.losses(model, batch).mean().backward()
    plain = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    names = []

    def spying(*args, **options):
        fusion = fused.find_fusion(*args, **options)
        names.extend(fusion.names)
        return fusion

    monkeypatch.setattr("fastminima.capture.session.attach.find_fusion", spying)
    probe = fm.GradientProbe(model, mode="fused", per_parameter=True)
    stats = probe.backward(zoo.losses(model, batch))
    assert HEADS[name] in names
    whole = torch.stack([g.square().sum() for g in plain.values()]).sum().sqrt()
    for n, p in model.named_parameters():
        error = (p.grad - plain[n]).norm() / plain[n].norm().clamp_min(whole / 100)
        assert error <= 1e-6, n
    want = norms(single_sample_gradients(twin(model), zoo.losses, batch))
    got = {k: v.double().sqrt() for k, v in stats.sq_norms_by_parameter.items()}
    assert worst(got, want) <= BOUND


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Mixtral"])
def test_the_loss_that_the_model_returns(name):
    """A mean over all tokens, a scalar."""
    (zoo,) = (zoo for zoo in LISTED if zoo.name == name)
    model, (ids, *_) = zoo.make()
    want = single_sample_gradients(twin(model), language, (ids,))
    loss = model(ids, labels=ids, use_cache=False).loss
    stats = fm.GradientProbe(model, per_parameter=True).backward(loss, len(ids))
    got = {k: v.double().sqrt() for k, v in stats.sq_norms_by_parameter.items()}
    assert worst(got, norms(want)) <= BOUND


def test_table_is_up_to_date(on_the_cpu):
    text = DOCUMENT.read_text()
    written_for = re.search(r"transformers (\d+\.\d+)", text)
    if written_for is None or not hf.__version__.startswith(written_for[1] + "."):
        pytest.skip(f"the table was written for {written_for and written_for[0]}")
    labels = [label for label in MODELS if HAS_TIMM or not label.startswith("timm")]
    written = {without_error(line) for line in section(text).splitlines()}
    missing = [
        row(label) for label in labels if without_error(row(label)) not in written
    ]
    assert not missing, f"run python {Path(__file__).name}"
    assert len(written) == len(MODELS) + 2  # and the heading


def row(label):
    zoo, found = MODELS[label], outcome(label)
    rules = ", ".join(f"`{rule.removesuffix('Backward0')}`" for rule in found.rules)
    return (
        f"| {zoo.name} ({zoo.what}) | `{found.model_class}` | {found.parameters} "
        f"| {rules} | {found.universal} | {found.error:.0e} |"
    )


def without_error(line):
    """The last column is rounding, which the machine decides."""
    return line.rpartition(" | ")[0]


def section(text):
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def table():
    head = "| model | class | parameters | rules | universal | worst relative error |"
    return "\n".join([head, "|---|---|---|---|---|---|", *map(row, MODELS)])


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")
