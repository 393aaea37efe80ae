"""The figures of the noise scale, in samples and in the optimizer's norm."""

from __future__ import annotations

import math

import numpy as np

from .columns import Columns
from .drawn import Drawn, drawn, positive
from .traces import bold, dashed, dots, interval

__all__ = ["noise_scale", "of_signs", "preconditioned"]


def noise_scale(columns: Columns) -> Drawn | None:
    """Single steps, the smoothed ratio with its interval, the batch size."""
    return _noise_scale_in(
        columns,
        "gradient/noise_scale",
        "noise-scale",
        "Noise scale beside the batch size",
        "tr Σ / |E g|², in samples: the batch size at which noise and signal of the "
        "gradient have equal power. Bold: the ratio of smoothed averages; shaded: its "
        "95 % interval, open at the top where it has no upper end. Far below it a "
        "larger batch saves steps, far above it one wastes samples.",
    )


def preconditioned(columns: Columns) -> Drawn | None:
    """The same in the norm of what the optimizer multiplies gradients with."""
    return _noise_scale_in(
        columns,
        "gradient/preconditioned_noise_scale",
        "preconditioned-noise-scale",
        "Noise scale in the optimizer's norm",
        "tr(P Σ) / gᵀP g, P what the optimizer multiplies the gradient with: the noise "
        "scale of the steps that it really takes.",
    )


def of_signs(columns: Columns) -> Drawn | None:
    """The same for steps by signs."""
    return _noise_scale_in(
        columns,
        "gradient/sign_noise_scale",
        "sign-noise-scale",
        "Noise scale of steps by signs",
        "(Σᵢ σᵢ / ⟨E g, s⟩)², s the signs of the momentum before the batch: in the "
        "mean of so many samples the deviations, summed, are as large as what a step "
        "gains. A momentum that averages k batches needs a k-th of it in each.",
    )


def _noise_scale_in(
    columns: Columns, name: str, id: str, title: str, glossary: str
) -> Drawn | None:
    smoothed = columns[f"{name}_smoothed"]
    single = columns[name]
    if not (np.isfinite(smoothed.values).any() or np.isfinite(single.values).any()):
        return None
    low, high = columns[f"{name}_low"], columns[f"{name}_high"]
    batch = columns["factors/batch_size"]
    steady = [c for c in (smoothed, low, high, batch) if len(c)] or [single]
    shown = np.concatenate([c.values for c in steady])
    shown = shown[np.isfinite(shown) & (shown > 0)]
    # A signal near zero makes a ratio as large as one likes; it need not be seen whole.
    top = min(shown.max(), 10 * np.quantile(shown, 0.95)) if len(shown) else 1.0
    traces = [dots(positive(single), "single steps", "blue")] if len(single) else []
    if len(low):
        traces.append(
            interval(positive(low), high, "orange", "95 % interval", 100 * top)
        )
    if len(smoothed):
        traces.append(bold(positive(smoothed), "smoothed", "orange"))
    if len(batch):
        traces.append(dashed(batch, "batch size"))
    figure = drawn(id, "Noise scale", title, glossary, traces, "samples")
    axis = figure.figure["layout"]["yaxis"]
    if axis["type"] == "log" and len(shown):
        axis["range"] = [math.log10(shown.min()) - 0.15, math.log10(top) + 0.15]
    return figure
