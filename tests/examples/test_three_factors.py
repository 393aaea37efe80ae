"""The analysis of the experiment on records whose answer is known."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from examples.three_factors import analysis, figure, report, settings, verdict

RATIOS, SIZES, SEEDS = (1e-4, 4e-4, 1.6e-3), (8, 16, 32), (0, 1)
LOSSES = (0.5, 0.24, 0.09, 0.01)


def measurement(loss, scale, accuracy):
    """Curvature proportional to the loss to the power 0.7."""
    values = dict.fromkeys(analysis.SHARPNESS, scale * loss**0.7)
    return {
        **values,
        "epoch": 1.0,
        "train_loss": loss,
        "train_accuracy": 1.0,
        "validation_accuracy": accuracy,
        "validation_loss": 1.0,
        "covariance_trace": loss**2,
        "temperature": 1e-5 * loss,
    }


def experiment(scale, accuracy=lambda ratio: ratio):
    """Records of a grid where sharpness is `scale(ratio, size)`, within 2 %."""
    rng = np.random.default_rng(0)
    found = []
    for ratio, size, seed in itertools.product(RATIOS, SIZES, SEEDS):
        noise = math.exp(0.01 * rng.standard_normal())
        found.append(
            {
                "learning_rate": ratio * size,
                "batch_size": size,
                "ratio": ratio,
                "seed": seed,
                "status": "finished",
                "measurements": [
                    measurement(
                        loss,
                        noise * scale(ratio, size),
                        accuracy(ratio) + 1e-6 * rng.standard_normal(),
                    )
                    for loss in LOSSES
                ],
            }
        )
    return found


def small_settings():
    return settings.Settings(
        preset="test",
        dataset="digits",
        train_size=100,
        validation_size=10,
        hidden=(4,) * 20,
        pairs=tuple((r * s, s) for r in RATIOS for s in SIZES),
        seeds=SEEDS,
        epochs=1,
        rungs=(0.5, 0.25, 0.1, 0.001),
        measure_size=10,
        products=2,
    )


def judge(found):
    loss = analysis.common_loss(found, small_settings().rungs)
    return verdict.judge(analysis.at_loss(found, loss), analysis.at_end(found), loss)


def test_a_power_of_the_loss_is_interpolated_exactly():
    found = experiment(lambda ratio, size: 5.0)
    for row, record in zip(analysis.at_loss(found, 0.1), found, strict=True):
        first = record["measurements"][0]
        want = first["trace"] * (0.1 / first["train_loss"]) ** 0.7
        assert row.values["trace"] == pytest.approx(want)
        assert row.values["covariance_trace"] == pytest.approx(0.01)
        assert row.values["train_loss"] == 0.1


def test_matched_loss_is_the_lowest_that_all_runs_reached():
    found = experiment(lambda ratio, size: 5.0)
    assert analysis.common_loss(found, (0.5, 0.25, 0.1, 0.001)) == 0.1
    found[0]["measurements"] = found[0]["measurements"][:2]
    assert analysis.common_loss(found, (0.5, 0.25, 0.1, 0.001)) == 0.25
    assert math.isnan(analysis.common_loss(found, (0.9, 0.001)))
    # Where one run reached nothing, what three quarters reached.
    found[0]["measurements"] = found[0]["measurements"][:1]
    assert analysis.common_loss(found, (0.25, 0.1)) == 0.1
    found[0]["status"] = "diverged"
    assert len(analysis.at_end(found)) == len(found) - 1


def test_estimates_that_came_out_negative_are_left_out():
    found = experiment(lambda ratio, size: 1 / ratio)
    found[0]["measurements"][2]["trace"] = -1.0
    rows = analysis.at_loss(found, 0.1)
    assert math.isnan(rows[0].values["trace"])
    assert analysis.correlation(rows, "trace").count == len(rows) - 1
    assert math.isfinite(analysis.spread(rows, "trace").across_beta)


def test_correlation_is_spearman_with_ties():
    rng = np.random.default_rng(3)
    x = rng.integers(1, 5, 40) / 10
    y = x + rng.normal(0, 0.2, 40)
    rows = [
        analysis.Row(1.0, 1, float(a), 0, {"v": float(b)})
        for a, b in zip(x, y, strict=True)
    ]
    got, want = analysis.correlation(rows, "v"), scipy.stats.spearmanr(x, y)
    assert got.rho == pytest.approx(want.statistic)
    assert got.low < got.rho < got.high
    assert got.count == 40
    assert analysis.correlation(rows, "v", sign=-1).rho == pytest.approx(-got.rho)
    few = analysis.correlation(rows[:7], "v")
    exact = scipy.stats.permutation_test(
        (x[:7],), lambda a: scipy.stats.spearmanr(a, y[:7]).statistic,
        permutation_type="pairings", n_resamples=math.inf,
    )  # fmt: skip
    assert few.p == pytest.approx(exact.pvalue, abs=0.02)


@pytest.mark.parametrize("count", [1, 6])
def test_where_nothing_varies_there_is_no_correlation(count):
    rows = [analysis.Row(1.0, 1, 0.1, 0, {"v": float(i)}) for i in range(count)]
    got = analysis.correlation(rows, "v")
    assert math.isnan(got.rho) and math.isnan(got.p)


def test_spread_is_the_factor_between_means_over_seeds():
    found = experiment(lambda ratio, size: (1e-4 / ratio) * (size / 8) ** 0.5)
    s = analysis.spread(analysis.at_end(found), "trace")
    assert s.ratio_power == pytest.approx(1, abs=0.01)
    assert s.beta_power == pytest.approx(-0.5, abs=0.01)
    assert s.across_beta == pytest.approx(2, rel=0.03)
    assert s.across_ratio == pytest.approx(16, rel=0.03)
    assert 1 < s.across_seeds < 1.05
    assert list(s.by_ratio) == list(RATIOS)


def test_the_claim_holds_where_it_does():
    found = judge(experiment(lambda ratio, size: ratio**-0.5))
    assert found.width_rises and found.ratio_decides and found.accuracy_rises
    assert found.sentence.startswith("The claim HELD: at train loss 0.1 the width")


def test_without_accuracy_it_holds_for_the_width():
    found = judge(experiment(lambda ratio, size: ratio**-0.5, lambda ratio: -ratio))
    assert "HELD FOR THE WIDTH" in found.sentence
    assert "validation accuracy falls with it at the end" in found.sentence


def test_where_only_the_learning_rate_matters_the_ratio_does_not_decide():
    found = judge(experiment(lambda ratio, size: (ratio * size) ** -0.5))
    assert found.width_rises and not found.ratio_decides
    assert "HELD IN PART" in found.sentence
    powers = found.spread["lambda_max"]
    assert powers.ratio_power == pytest.approx(powers.beta_power, abs=0.01)


@pytest.mark.parametrize(
    "scale",
    [
        lambda ratio, size: ratio**0.5,
        lambda ratio, size: 1.0,
        lambda ratio, size: size**0.5,
    ],
)
def test_the_claim_fails_where_it_does(scale):
    found = judge(experiment(scale))
    assert not found.width_rises
    assert "DID NOT HOLD" in found.sentence


def test_report_and_figure(tmp_path):
    found = experiment(lambda ratio, size: ratio**-0.5)
    found[-1] = {**found[-1], "status": "diverged", "measurements": []}
    text = report.report(small_settings(), found)
    assert "1 runs diverged and are left out: (0.0512, 32)." in text
    assert text.count("│") == 1 + len(RATIOS) * len(SIZES)
    assert "tr C / tr H" in text and text.splitlines()[-1].startswith("The claim HELD")
    path = figure.draw(small_settings(), found, tmp_path / "new" / "figure.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_too_little_to_compare_is_said():
    found = experiment(lambda ratio, size: 1.0)[:6]
    assert "nothing to compare" in report.report(small_settings(), found)


@pytest.mark.parametrize("dataset", ["fashion-mnist", "digits", "cifar10"])
@pytest.mark.parametrize("quickest", [False, True])
@pytest.mark.parametrize("name", settings.PRESETS)
def test_presets_have_the_grid_that_the_claim_needs(name, dataset, quickest):
    s = settings.preset(name, dataset, quickest=quickest)
    sizes = {}
    for run in s.runs:
        sizes.setdefault(run.ratio, set()).add(run.batch_size)
    assert sum(len(v) >= 3 for v in sizes.values()) >= 3
    assert len(s.seeds) >= 2
    assert len(set(s.runs)) == len(s.pairs) * len(s.seeds)
    assert max(run.batch_size for run in s.runs) <= s.train_size


def test_a_fingerprint_belongs_to_settings_and_not_to_the_grid():
    import dataclasses

    one = small_settings()
    grown = dataclasses.replace(one, seeds=(0, 1, 2))
    longer = dataclasses.replace(one, epochs=2)
    assert one.fingerprint == grown.fingerprint != longer.fingerprint
