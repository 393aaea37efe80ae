"""Which implementation an op prefers on a GPU, and what says so.

What was measured on an H100 decides, `2026-11-26-0058-d17c21fe-h100-kernels.json` in
benchmarks/records: a kernel is preferred where all sizes together took it less of the
device's time than PyTorch's operations, and none of them a tenth more. The lines are
those of `python -m tools.kernels.floors --preferences`, which falls back on a
model of lower bounds where nothing was measured; a test holds both together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["ON_GPU", "Preference", "is_preferred"]


class Preference(NamedTuple):
    """What to use, and how much faster the kernels are than PyTorch's operations."""

    backend: str
    speedup: float  # at the worst of the sizes
    source: str = "measured on an H100"


_HALF, _FLOAT, _IDS = torch.bfloat16, torch.float32, torch.int64
_MODELLED = "bounds for an H100, not measured"
# float16 is as bfloat16; float64 as float32, where memory decides.
ON_GPU: dict[tuple[str, torch.dtype], Preference] = {
    ("attention", _HALF): Preference("triton", 410, _MODELLED),
    ("attention", _FLOAT): Preference("triton", 20, _MODELLED),
    ("attention_gradients", _HALF): Preference("triton", 140, _MODELLED),
    ("attention_gradients", _FLOAT): Preference("triton", 8.6, _MODELLED),
    ("attention_gradients_tangent", _HALF): Preference("triton", 140, _MODELLED),
    ("attention_gradients_tangent", _FLOAT): Preference("triton", 8.2, _MODELLED),
    ("attention_tangent", _HALF): Preference("triton", 250, _MODELLED),
    ("attention_tangent", _FLOAT): Preference("triton", 9.9, _MODELLED),
    ("channel_norm_gradients", _HALF): Preference("triton", 0.96),
    ("channel_norm_gradients", _FLOAT): Preference("triton", 4.1),
    ("conv_fused", _HALF): Preference("triton", 2.7),
    ("conv_fused", _FLOAT): Preference("triton", 2.1),
    ("conv_second_moment", _HALF): Preference("triton", 5.3),
    ("conv_second_moment", _FLOAT): Preference("triton", 2),
    ("conv_sq_norms", _HALF): Preference("triton", 1.8),
    ("conv_sq_norms", _FLOAT): Preference("triton", 2.6),
    ("direct_sq_norms", _HALF): Preference("triton", 5.8),
    ("direct_sq_norms", _FLOAT): Preference("triton", 1.1),
    ("dots", _FLOAT): Preference("cuda", 7.3, _MODELLED),
    ("embedding_dots", _IDS): Preference("reference", 0.61),
    ("embedding_second_moment", _IDS): Preference("cuda", 3.7),
    ("embedding_sq_norms", _IDS): Preference("cuda", 11),
    ("gram_sq_norms", _HALF): Preference("triton", 8.4),
    ("gram_sq_norms", _FLOAT): Preference("reference", 0.44),
    ("lanczos_step", _FLOAT): Preference("cuda", 3.9),
    ("langevin_step_", _HALF): Preference("cuda", 2.6e02, _MODELLED),
    ("langevin_step_", _FLOAT): Preference("cuda", 3e02),
    ("layer_norm_gradients", _HALF): Preference("triton", 5.5),
    ("layer_norm_gradients", _FLOAT): Preference("triton", 3.6),
    ("linear_combinations", _FLOAT): Preference("cuda", 8),
    ("multi_sq_norm", _HALF): Preference("cuda", 18, _MODELLED),
    ("multi_sq_norm", _FLOAT): Preference("cuda", 14),
    ("power_step", _FLOAT): Preference("cuda", 8.8),
    ("product_over_time", _HALF): Preference("triton", 4),
    ("product_over_time", _FLOAT): Preference("triton", 1.3),
    ("project_out", _FLOAT): Preference("cuda", 5.9),
    ("row_sq_norms", _HALF): Preference("triton", 2.1),
    ("row_sq_norms", _FLOAT): Preference("triton", 3.2),
    ("sample_sq_norms", _FLOAT): Preference("triton", 1.7, _MODELLED),
    ("sequence_dots", _HALF): Preference("triton", 1.9),
    ("sequence_dots", _FLOAT): Preference("reference", 0.86),
    ("sequence_fused", _HALF): Preference("triton", 2.9),
    ("sequence_fused", _FLOAT): Preference("reference", 0.93),
    ("sequence_gram", _HALF): Preference("triton", 1),
    ("sequence_gram", _FLOAT): Preference("triton", 1.1),
    ("sequence_multi_dots", _HALF): Preference("triton", 7.3),
    ("sequence_multi_dots", _FLOAT): Preference("triton", 3),
    ("sequence_second_moment", _HALF): Preference("triton", 6.2),
    ("sequence_second_moment", _FLOAT): Preference("reference", 0.82),
    ("sequence_sq_norms", _HALF): Preference("triton", 1.7),
    ("sequence_sq_norms", _FLOAT): Preference("reference", 0.57),
    ("sq_norm", _HALF): Preference("triton", 5),
    ("sq_norm", _FLOAT): Preference("triton", 2),
    ("sum_over_space", _HALF): Preference("triton", 1),
    ("sum_over_space", _FLOAT): Preference("triton", 1.1),
    ("sum_over_time", _HALF): Preference("triton", 1.3),
    ("sum_over_time", _FLOAT): Preference("triton", 1.1),
}


def is_preferred(op: str, backend: str, dtype: torch.dtype) -> bool:
    """Whether the op of that name uses this implementation on a GPU.

    Raises:
        LookupError: where nothing says so: what is not decided would go PyTorch's way.
    """
    key = op, {torch.float16: _HALF, torch.float64: _FLOAT}.get(dtype, dtype)
    if key not in ON_GPU:
        raise LookupError(
            f"No preference for {op} in {dtype}. Time it (tools/kernels/cases.py), or "
            "let `python -m tools.kernels.floors --preferences` say its bounds."
        )
    return ON_GPU[key].backend == backend
