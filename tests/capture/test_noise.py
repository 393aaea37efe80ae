"""Graphs whose backward pass is not the same twice, as on a GPU."""

import warnings

import pytest
import torch
from cases import CASES
from noisy_backward import noisy
from torch import nn
from torch.nn.functional import cross_entropy
from transformers_models import LISTED

import fastminima as fm
from fastminima.capture.options import Request

MODES = ("float32", "autocast", "bfloat16")


def in_mode(mode, model, batch):
    """A model and its batch in the dtype of a mode."""
    if mode != "bfloat16":
        return model, batch
    return model.bfloat16(), [
        t.bfloat16() if t.is_floating_point() else t for t in batch
    ]


def reading_of(case, mode, factor, seed, only=None):
    """Uses, layouts and fallbacks of a case under noise."""
    model, batch = in_mode(mode, *case.make())
    probe = fm.GradientProbe(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        losses = case.losses(model, batch)
    losses = losses.float()
    noisy(losses, factor, seed=seed, only=only)
    samples = Request(losses, None, "mean", 1.0).checked(0).samples
    found = probe._reader.read(losses, samples).recipe
    layouts = [
        (use.name, [str(layout) for layout in found.layouts[use.node]])
        for use in found.plan.uses
    ]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        stats = probe.backward(losses)
    assert stats.is_finite
    fallbacks = {str(w.message) for w in said if "No rule for" in str(w.message)}
    return layouts, fallbacks


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_layouts_and_rules_as_without_noise(case, mode):
    quiet = reading_of(case, mode, 0.0, 0)
    for factor in (1.0, 4.0):
        assert reading_of(case, mode, factor, seed=int(factor)) == quiet, factor


ATTENDING = [c for c in CASES if "attention" in c.name or "mha" in c.name]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("odd", [0, 1, 2, 3])
@pytest.mark.parametrize("case", ATTENDING, ids=lambda case: case.name)
def test_one_pass_that_differs_from_the_others(case, odd, mode):
    quiet = reading_of(case, mode, 0.0, 0)
    assert reading_of(case, mode, 1.0, 5, only=lambda number: number == odd) == quiet


def test_rows_that_mix_a_little_where_one_pass_differs():
    torch.manual_seed(0)
    model = Convolved("hundredth")
    losses = model(torch.randn(8, 3, 6, 6)).square().sum(1)
    noisy(losses, 1.0, only=lambda number: number == 1)
    with pytest.raises(fm.CaptureError, match="do not each belong"):
        fm.GradientProbe(model).backward(losses)


class Normalised(nn.Module):
    """A batch normalisation written by hand, whole or in part."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        dims = (0,) if x.dim() == 2 else (0, 2, 3)
        mean = x.mean(dims, keepdim=True)
        if self.kind == "whole":
            return (x - mean) / (x.var(dims, keepdim=True) + 1e-5).sqrt()
        return x - {"mean": 1.0, "hundredth": 0.01, "none": 0.0}[self.kind] * mean


class Convolved(nn.Sequential):
    def __init__(self, kind):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            Normalised(kind) if kind != "none" else nn.Identity(),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 5),
        )

    shape = (3, 8, 8)


class Attending(nn.Module):
    shape = (6, 8)

    def __init__(self, kind):
        super().__init__()
        self.inner = nn.Linear(8, 16)
        self.norm = Normalised(kind) if kind != "none" else nn.Identity()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        h = self.norm(self.inner(x).flatten(1)).view(len(x), -1, 16)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(h).mean(1)


@pytest.mark.parametrize("batch", [2, 3, 20])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["none", "whole", "mean", "hundredth"])
@pytest.mark.parametrize("build", [Convolved, Attending])
def test_what_mixes_is_refused_at_every_factor(build, kind, mode, batch):
    torch.manual_seed(1)
    model, (x,) = in_mode(mode, build(kind), [torch.randn(batch, *build.shape)])
    y = torch.randint(5, (batch,))
    for factor in (0.0, 1.0, 4.0):
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            out = model(x)
        losses = cross_entropy(out.float(), y, reduction="none")
        noisy(losses, factor, seed=int(factor))
        probe = fm.GradientProbe(model)
        if kind == "none":
            probe.backward(losses)
        else:
            with pytest.raises(fm.CaptureError, match="do not each belong"):
                probe.backward(losses)


def test_a_sample_with_a_tiny_loss_is_seen_through_noise():
    torch.manual_seed(0)
    model = Attending("none")
    x = torch.randn(6, 6, 8)
    weight = torch.tensor([1.0, 1e-5, 1.0, 1e-4, 1.0, 1.0])
    losses = model(x).square().sum(1) * weight
    noisy(losses, 4.0)
    probe = fm.GradientProbe(model)
    got = probe.backward(losses, retain_graph=True).sq_norms
    for n, loss in enumerate(losses):
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        want = sum(g.double().square().sum() for g in grads)
        torch.testing.assert_close(got[n].double(), want, rtol=1e-3, atol=0)
    assert probe._reader._structures  # every sample was seen, so this is remembered


def zoo_reading(zoo, mode, factor):
    """Uses, layouts and fallbacks of a model of a library under noise."""
    model, batch = zoo.make()
    if mode == "bfloat16":
        model = model.bfloat16()
        batch = tuple(t.bfloat16() if t.is_floating_point() else t for t in batch)
    probe = fm.GradientProbe(model)

    def losses():
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            found = zoo.losses(model, batch).float()
        noisy(found, factor, seed=int(factor))
        return found

    noise = losses()
    samples = Request(noise, None, "mean", 1.0).checked(0).samples
    found = probe._reader.read(noise, samples).recipe
    layouts = [
        (use.name, [str(layout) for layout in found.layouts[use.node]])
        for use in found.plan.uses
    ]
    said = []
    probe._attacher.announce = lambda node, parameters: said.append(node)
    assert probe.backward(losses()).is_finite
    return layouts, sorted(set(said))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("zoo", LISTED, ids=lambda zoo: f"{zoo.name}, {zoo.what}")
def test_models_of_transformers_read_alike_under_noise(zoo, mode):
    try:
        quiet = zoo_reading(zoo, mode, 0.0)
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, fm.CaptureError):
            raise
        pytest.skip(f"does not run in {mode} on a CPU: {str(error)[:80]}")
    for factor in (1.0, 4.0):
        assert zoo_reading(zoo, mode, factor) == quiet, factor
