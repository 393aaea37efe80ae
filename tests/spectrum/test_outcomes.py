"""What every solver makes of rank deficient, indefinite, zero and broken matrices."""

import math
import warnings

import pytest
import torch
from torch import nn

import fastminima as fm


class Form(nn.Module):
    """w^T A w / 2, whose Hessian is A."""

    def __init__(self, values):
        super().__init__()
        n = len(values)
        generator = torch.Generator("cpu").manual_seed(n)
        drawn = torch.randn(
            (n, n), generator=generator, dtype=torch.float64, device="cpu"
        )
        turned, _ = torch.linalg.qr(drawn)
        diagonal = torch.tensor(values, dtype=torch.float64, device="cpu")
        matrix = turned * diagonal @ turned.T
        self.register_buffer("matrix", (matrix + matrix.T) / 2)
        self.weight = nn.Parameter(torch.full_like(diagonal, 0.3))

    def forward(self, x):
        return 0.5 * self.weight @ self.matrix @ self.weight + 0 * x.sum()


class Rough(Form):
    """A finite gradient, and a second derivative that is none."""

    def forward(self, x):
        return super().forward(x) + (self.weight[0] * 0).abs().pow(1.5)


def loss(model, batch):
    return model(batch)


def rows(device, count=4):
    return torch.zeros(count, 1, dtype=torch.float64, device=device)


SPECTRA = {
    "rank one": [5.0, 0, 0, 0, 0, 0],
    "indefinite": [3.0, -4, 1, 0, 0.5, 2],
    "both ends alike": [3.0, -3, 1, -1],
    "negative": [-3.0, -4, -1, -2],
    "zero": [0.0, 0, 0, 0, 0],
    "one parameter": [2.0],
}
SUMS = {
    "trace": (lambda H: fm.trace(H), sum),
    "hutchinson": (lambda H: fm.trace(H, method="hutchinson"), sum),
    "xtrace": (lambda H: fm.trace(H, method="xtrace"), sum),
    "frobenius_norm": (fm.frobenius_norm, lambda v: math.hypot(*v)),
    "log_determinant": (
        lambda H: fm.log_determinant(H, damping=5.0),
        lambda v: sum(math.log(x + 5) for x in v),
    ),
    "effective_dimension": (
        lambda H: fm.effective_dimension(H, 0.1, above=0.0),
        lambda v: sum(x / (x + 0.1) for x in v if x > 1e-9),
    ),
}
PAIRS = {
    f"{which} {method}": (which, method)
    for which in ("largest", "smallest", "magnitude")
    for method in ("lanczos", "power")
}
KEYS = {
    "largest": lambda v: -v,
    "smallest": lambda v: v,
    "magnitude": lambda v: -abs(v),
}


def pairs_of(H, name, k=1):
    which, method = PAIRS[name]
    return fm.top_eigenpairs(H, k=k, which=which, method=method)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_eigenpairs_are_right_or_warned_of(spectrum, name, device):
    values = SPECTRA[spectrum]
    H = fm.Hessian(Form(values).to(device), loss, rows(device))
    key = KEYS[PAIRS[name][0]]
    truth = sorted(values, key=key)
    size = max(map(abs, values))
    for k in sorted({1, min(2, len(values)), len(values)}):
        with warnings.catch_warnings(record=True) as met:
            warnings.simplefilter("always")
            pairs = pairs_of(H, name, k)
        is_warned = any("stopped after" in str(w.message) for w in met)
        assert pairs.converged != is_warned
        assert bool(torch.isfinite(pairs.vectors).all())
        if pairs.converged:
            # By size, both ends alike may come in either order.
            found, wanted = pairs.values.tolist(), truth[:k]
            if name.startswith("magnitude"):
                found, wanted = [abs(v) for v in found], [abs(v) for v in wanted]
            assert found == pytest.approx(wanted, rel=1e-2, abs=1e-2 * size)
    with pytest.raises(ValueError, match=rf"between 1 and .* size {len(values)}, got"):
        pairs_of(H, name, len(values) + 1)


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_sums_are_exact(spectrum, name, device):
    values = SPECTRA[spectrum]
    H = fm.Hessian(Form(values).to(device), loss, rows(device))
    solve, truth = SUMS[name]
    found = solve(H)
    assert found.value == pytest.approx(truth(values), rel=1e-6, abs=1e-6)
    assert found.standard_error == 0


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_densities_hold_the_spectrum(spectrum, device):
    values = SPECTRA[spectrum]
    H = fm.Hessian(Form(values).to(device), loss, rows(device))
    found = fm.spectral_density(H, steps=8, probes=2)
    assert bool(torch.isfinite(found.density).all())
    assert float(found.grid[0]) < min(values) + 1e-9
    assert float(found.grid[-1]) > max(values) - 1e-9


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_probes_and_preconditioned_matrices(spectrum, device):
    values = SPECTRA[spectrum]
    model = Form(values).to(device)
    probe = fm.SharpnessProbe(model, loss)
    for _ in range(2):
        pairs = probe(rows(device))
        assert pairs.converged
        assert float(pairs.values[0]) == pytest.approx(max(values), rel=1e-2, abs=1e-9)
    half = torch.full((len(values),), 4.0, dtype=torch.float64, device=device)
    scaled = fm.Hessian(model, loss, rows(device)).preconditioned(half)
    found = fm.top_eigenpairs(scaled)
    assert float(found.values[0]) == pytest.approx(max(values) / 4, rel=1e-2, abs=1e-9)


STEPS = {
    "critical": lambda m, b: fm.critical_sharpness(m, loss, b),
    "batches": lambda m, b: fm.batch_sharpness(m, loss, [b, b]),
    "along": lambda m, b: fm.directional_sharpness(fm.Hessian(m, loss, b)),
}


@pytest.mark.parametrize(
    ("spectrum", "step", "says"),
    [
        ("zero", "critical", "direction is 0.0: there is no way to go"),
        ("zero", "batches", "0 batches had a gradient"),
        ("zero", "along", "not all zero"),
        ("negative", "critical", "does not grow along the direction"),
    ],
)
def test_steps_that_lead_nowhere(spectrum, step, says, device):
    with pytest.raises(ValueError, match=says):
        STEPS[step](Form(SPECTRA[spectrum]).to(device), rows(device))


@pytest.mark.parametrize("spectrum", ["rank one", "indefinite", "negative"])
def test_steps_along_the_gradient(spectrum, device):
    model = Form(SPECTRA[spectrum]).to(device)
    g = (model.matrix @ model.weight).detach()
    truth = float(g @ model.matrix @ g / (g @ g))
    for step in ("batches", "along"):
        found = STEPS[step](model, rows(device))
        assert float(getattr(found, "value", found)) == pytest.approx(truth)


def _solvers():
    for name in PAIRS:
        yield name, lambda m, b, n=name: pairs_of(fm.Hessian(m, loss, b), n)
    for name, (solve, _) in SUMS.items():
        yield name, lambda m, b, s=solve: s(fm.Hessian(m, loss, b))
    yield "density", lambda m, b: fm.spectral_density(fm.Hessian(m, loss, b))
    yield "probe", lambda m, b: fm.SharpnessProbe(m, loss)(b)
    yield from STEPS.items()


SOLVERS = dict(_solvers())
REMEDY = r"not finite|non-finite|Check the (batch|parameters)|check the batch"


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("fault", ["parameter", "batch", "product", "empty"])
def test_what_is_no_number_is_said(fault, name, device):
    model, batch = Form([1.0, 2, 3]).to(device), rows(device)
    says = REMEDY
    if fault == "parameter":
        model.weight.data[1] = float("nan")
    elif fault == "batch":
        batch[0] = float("nan")
    elif fault == "product":
        model = Rough([1.0, 2, 3]).to(device)
        if name == "critical":
            return  # takes no second derivative
    else:
        batch, says = batch[:0], "hold no samples"
        if name == "critical":
            return  # has a loss of its own to say what an empty batch means
    with pytest.raises(ValueError, match=says):
        SOLVERS[name](model, batch)


class _Breaking:
    """A matrix whose products are no numbers from some product on."""

    def __init__(self, device, at):
        self._matrix = torch.diag(
            torch.arange(1.0, 41, dtype=torch.float64, device=device)
        )
        self.shape, self.dtype, self.device = (40, 40), torch.float64, device
        self.products, self._at = 0, at

    def __matmul__(self, v):
        self.products += 1 if v.dim() == 1 else v.shape[1]
        product = self._matrix @ v
        return product if self.products < self._at else product * float("nan")


@pytest.mark.parametrize("at", [1, 2, 3, 7])
@pytest.mark.parametrize("name", [*PAIRS, *SUMS, "density"])
def test_a_product_that_breaks_later_is_said(name, at, device):
    H = _Breaking(device, at)
    with pytest.raises(ValueError, match=r"not finite\. Check the parameters"):
        if name in PAIRS:
            pairs_of(H, name, k=3)
        elif name == "density":
            fm.spectral_density(H)
        else:
            SUMS[name][0](H)


def test_a_probe_goes_on_after_what_was_no_number(device):
    model = Form([1.0, 2, 3]).to(device)
    probe = fm.SharpnessProbe(model, loss)
    probe(rows(device))
    kept = model.weight.detach().clone()
    model.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="non-finite"):
        probe(rows(device))
    model.weight.data.copy_(kept)
    assert float(probe(rows(device)).values[0]) == pytest.approx(3, rel=1e-2)
