"""Which implementation an op prefers on a GPU, and what says so.

None is preferred until something says that it is faster. So far that is the floor model
of `benchmarks/floors.py`: lower bounds on the time of PyTorch's operations and of the
kernels as they compile for an H100. A kernel is preferred where its bound is less than
two thirds of theirs at every size tried. Nothing was measured; once there are records
of a GPU, their numbers and names belong here instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["ON_GPU", "Preference", "is_preferred"]


class Preference(NamedTuple):
    """What to use, and how much faster the kernels are than PyTorch's operations."""

    backend: str
    speedup: float | None  # at the worst of the sizes; None where nothing told it
    source: str = "bounds for an H100, not measured"


# PyTorch's way counts distinct ids, for which the host waits.
_DOES_NOT_WAIT = (
    "can be held by a CUDA graph; its speed was neither modelled nor measured"
)
_HALF, _FLOAT = torch.bfloat16, torch.float32
# float16 is as bfloat16; float64 as float32, where memory decides.
ON_GPU: dict[tuple[str, torch.dtype], Preference] = {
    ("channel_norm_fused", _HALF): Preference("triton", 5.5),
    ("channel_norm_fused", _FLOAT): Preference("triton", 4.5),
    ("channel_norm_gradients", _HALF): Preference("triton", 10),
    ("channel_norm_gradients", _FLOAT): Preference("triton", 4.7),
    ("conv_fused", _HALF): Preference("triton", 3.7),
    ("conv_fused", _FLOAT): Preference("triton", 2.9),
    ("conv_second_moment", _HALF): Preference("triton", 18),
    ("conv_second_moment", _FLOAT): Preference("triton", 2.5),
    ("conv_sq_norms", _HALF): Preference("triton", 3),
    ("conv_sq_norms", _FLOAT): Preference("triton", 10),
    ("direct_sq_norms", _HALF): Preference("triton", 4.6),
    ("direct_sq_norms", _FLOAT): Preference("reference", 1.2),
    ("embedding_sq_norms", torch.int64): Preference("cuda", None, _DOES_NOT_WAIT),
    ("embedding_second_moment", torch.int64): Preference("cuda", None, _DOES_NOT_WAIT),
    ("gathered_sq_norms", _HALF): Preference("triton", 30),
    ("gathered_sq_norms", _FLOAT): Preference("triton", 3.2),
    ("gaussian_fill_", _FLOAT): Preference("cuda", 74),
    ("gram_sq_norms", _HALF): Preference("triton", 5.4),
    ("gram_sq_norms", _FLOAT): Preference("triton", 1.7),
    ("lanczos_step", _FLOAT): Preference("cuda", 2.6),
    ("langevin_step_", _FLOAT): Preference("cuda", 1.1e02),
    ("layer_norm_fused", _HALF): Preference("triton", 4.6),
    ("layer_norm_fused", _FLOAT): Preference("triton", 3.1),
    ("layer_norm_gradients", _HALF): Preference("triton", 7.2),
    ("layer_norm_gradients", _FLOAT): Preference("triton", 3.9),
    ("linear_combinations", _FLOAT): Preference("cuda", 3.2),
    ("multi_axpy", _FLOAT): Preference("cuda", 2.7),
    ("multi_dot", _FLOAT): Preference("cuda", 6.5),
    ("multi_sq_norm", _FLOAT): Preference("cuda", 13),
    ("power_step", _FLOAT): Preference("cuda", 7.3),
    ("product_over_time", _HALF): Preference("triton", 5.1),
    ("product_over_time", _FLOAT): Preference("triton", 1.7),
    ("project_out", _FLOAT): Preference("cuda", 5.1),
    ("rademacher_fill_", _FLOAT): Preference("cuda", 64),
    ("row_sq_norms", _HALF): Preference("triton", 8.3),
    ("row_sq_norms", _FLOAT): Preference("triton", 4.1),
    ("sequence_dots", _HALF): Preference("triton", 4.7),
    ("sequence_dots", _FLOAT): Preference("reference", 0.93),
    ("sequence_fused", _HALF): Preference("triton", 3.2),
    ("sequence_fused", _FLOAT): Preference("reference", 1.2),
    ("sequence_gram", _HALF): Preference("reference", 0.64),
    ("sequence_gram", _FLOAT): Preference("reference", 0.96),
    ("sequence_multi_dots", _HALF): Preference("triton", 13),
    ("sequence_multi_dots", _FLOAT): Preference("reference", 0.83),
    ("sequence_second_moment", _HALF): Preference("triton", 9.9),
    ("sequence_second_moment", _FLOAT): Preference("reference", 1.1),
    ("sequence_sq_norms", _HALF): Preference("triton", 1.9),
    ("sequence_sq_norms", _FLOAT): Preference("triton", 2.2),
    ("sq_norm", _HALF): Preference("triton", 5.4),
    ("sq_norm", _FLOAT): Preference("triton", 2.4),
    ("sum_over_space", _HALF): Preference("reference", 1),
    ("sum_over_space", _FLOAT): Preference("reference", 1),
    ("sum_over_time", _HALF): Preference("reference", 0.7),
    ("sum_over_time", _FLOAT): Preference("reference", 0.79),
}


def is_preferred(op: str, backend: str, dtype: torch.dtype) -> bool:
    """Whether the op of that name uses this implementation on a GPU."""
    key = op, {torch.float16: _HALF, torch.float64: _FLOAT}.get(dtype, dtype)
    return key in ON_GPU and ON_GPU[key].backend == backend
