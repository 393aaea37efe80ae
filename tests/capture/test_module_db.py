"""Every module that `torch.testing` knows is exact, or refused by name.

`python tests/capture/test_module_db.py`, with the repository and tests/ on PYTHONPATH,
writes what it finds into docs/coverage.md.
"""

import dataclasses
import inspect
import re
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from module_db_examples import NAMES, Example, examples

import fastminima as fm

DOCUMENT = Path(__file__).parents[2] / "docs" / "coverage.md"
BEGIN, END = "<!-- table:modules -->", "<!-- /table -->"

# What may be refused: modules, the first words of the message, what the table says.
REFUSALS = [
    (
        r"nn\.BatchNorm",
        "Batch normalisation in training mode mixes the samples",
        "with statistics of the batch it mixes the samples",
    ),
    (
        r"nn\.(LayerNorm|RMSNorm)",
        "The vector of per-sample losses is empty",
        "an input with no sample in it",
    ),
    (
        r"nn\.LinearCrossEntropyLoss",
        "No batch axis of size",
        "computed in chunks, its gradient is summed in the forward pass; "
        'exact with `reduction="none"` or `options=None`',
    ),
]
CPU = torch.device("cpu")
# A gradient counts as zero below this part of the sample's whole gradient: that of a
# bias before a normalisation or a softmax is nothing but rounding.
NEGLIGIBLE = 1e-4


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one example; `reason` says why it was refused."""

    label: str
    reason: str | None
    without_rule: frozenset[str]


@pytest.mark.parametrize("name", NAMES)
def test_exact_or_refused(name, device):
    assert all(isinstance(outcome, Outcome) for outcome in outcomes(name, device))


def test_the_count(capsys, device):
    """Each was judged in the test of its name above."""
    found = [outcome for name in NAMES for outcome in outcomes(name, device)]
    refused = [outcome for outcome in found if outcome.reason is not None]
    names = {outcome.label.split()[0] for outcome in found}
    with capsys.disabled():
        print(f"\n{summary(found)}")
    # PyTorch 2.11 has fewer, 2.13 some more.
    assert len(names) >= (33 if torch.__version__.startswith("2.11.") else 36), names
    assert len(found) > 1000
    assert len(refused) < len(found) / 3


def test_table_is_up_to_date(device):
    if device.type != "cpu":
        pytest.skip("the table is the CPU's, where kernels have their own nodes")
    text = DOCUMENT.read_text()
    written_for = re.search(r"PyTorch (\d+\.\d+)", text).group(1)
    if not torch.__version__.startswith(written_for + "."):
        pytest.skip(f"the table was written for PyTorch {written_for}")
    assert with_table(text) == text, f"run python {Path(__file__).name}"


@cache
def outcomes(name: str, device: torch.device = CPU) -> tuple[Outcome, ...]:
    """In training and in evaluation: judged twice only where the two can differ."""
    training, evaluation = (
        tuple(examples(name, mode, device)) for mode in (True, False)
    )
    found = tuple(map(judged, training))
    parts = {type(part) for e in evaluation for part in e.module.modules()}
    if any(map(knows_its_mode, parts)):
        return found + tuple(map(judged, evaluation))
    assert [e.label for e in evaluation] == [e.label for e in training]
    return found * 2


@cache
def knows_its_mode(kind: type) -> bool:
    """Whether a module's own code asks for `self.training`."""
    own = kind.__mro__[: kind.__mro__.index(torch.nn.Module)]
    return any("self.training" in inspect.getsource(each) for each in own)


def test_modules_that_know_their_mode():
    nn = torch.nn
    knowing = (nn.BatchNorm2d, nn.Dropout, nn.GRU, nn.MultiheadAttention)
    assert all(map(knows_its_mode, knowing))
    assert not any(map(knows_its_mode, (nn.Linear, nn.Conv2d, nn.LayerNorm)))


def judged(example: Example) -> Outcome:
    """Its outcome; an AssertionError where it is neither exact nor refused by name."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_exact(example)
        except fm.CaptureError as error:
            reasons = [
                why
                for modules, words, why in REFUSALS
                if re.match(modules, example.label) and str(error).startswith(words)
            ]
            assert reasons, f"{example.label} refused: {error}"
            return Outcome(example.label, reasons[0], frozenset())
    messages = [str(w.message) for w in caught]
    nodes = [re.match(r"No rule for (\w+)", message) for message in messages]
    return Outcome(example.label, None, frozenset(n.group(1) for n in nodes if n))


def check_exact(example: Example) -> None:
    """Against single samples in float64, and against autograd in float32."""
    double = example.double()
    got = probed(double)
    want = looped(double)
    assert error(got, want) < 1e-10, f"{example.label}, float64: {got} != {want}"
    got = probed(example)
    if error(got, want) < 1e-5:
        return
    # Is it the float32 graph that is off? Then autograd's own gradients are too.
    assert example.scalar is None, f"{example.label}, float32: {got} != {want}"
    plain = differentiated(example)
    assert error(got, plain) < 1e-5, f"{example.label}, float32: {got} != {plain}"


def probed(example: Example) -> torch.Tensor:
    """The probe's |g_n|, `[parameters, batch]`."""
    model = example.module
    probe = fm.GradientProbe(model, per_parameter=True)
    if example.scalar is None:
        loss = example.losses(example.args, example.kwargs)
        stats = probe.backward(loss)
    else:
        loss = model(*example.args, **example.kwargs)
        stats = probe.backward(loss, example.count, example.scalar)
    nothing = torch.zeros(example.count)
    found = stats.sq_norms_by_parameter
    names = [name for name, _ in model.named_parameters()]
    return torch.stack([found.get(n, nothing).double().sqrt() for n in names])


def looped(example: Example) -> torch.Tensor:
    """|g_n| from each sample alone, `[parameters, batch]`."""
    rows = []
    for n in range(example.count):
        losses = example.losses(*example.sample(n))
        assert losses.shape == (1,)
        rows.append(norms(losses[0], example.module))
    return torch.stack(rows, 1)


def differentiated(example: Example) -> torch.Tensor:
    """|g_n| from one graph of all samples, `[parameters, batch]`."""
    losses = example.losses(example.args, example.kwargs)
    return torch.stack([norms(loss, example.module) for loss in losses], 1)


def norms(loss: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    zero = torch.zeros((), dtype=torch.float64)
    return torch.stack([zero if g is None else g.double().norm() for g in grads])


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Worst difference of a parameter's norms, relative to its largest."""
    whole = want.square().sum(0).sqrt().max()
    scale = want.amax(1).clamp_min(NEGLIGIBLE * whole).clamp_min(1e-300)
    return ((got - want).abs().amax(1) / scale).max().item()


def summary(found: list[Outcome]) -> str:
    names = {outcome.label.split()[0] for outcome in found}
    exact = sum(outcome.reason is None for outcome in found)
    return (
        f"{len(NAMES)} entries of module_db, {len(names)} with parameters, "
        f"{len(found)} examples: {exact} exact, {len(found) - exact} refused by name, "
        "0 otherwise."
    )


def table() -> str:
    lines = [
        "| module | examples | exact | refused | why | read without a rule |",
        "|---|---|---|---|---|---|",
    ]
    everything = []
    for name in NAMES:
        found = outcomes(name, CPU)  # as the tests ask: computed once
        if not found:
            continue
        everything += found
        refused = [outcome.reason for outcome in found if outcome.reason]
        why = sorted(set(refused))
        nodes = sorted(set().union(*(outcome.without_rule for outcome in found)))
        cells = [f"`{name}`", len(found), len(found) - len(refused), len(refused)]
        cells += ["; ".join(why), ", ".join(f"`{node}`" for node in nodes)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([summary(everything), "", *lines])


def with_table(text: str) -> str:
    before, rest = text.split(BEGIN)
    _, after = rest.split(END, 1)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
