"""The number formats that NumPy lacks, by their bits."""

from __future__ import annotations

import numpy as np

__all__ = ["bf16_to_f32", "f32_to_bf16", "to_tf32"]

_TF32_BITS = 13  # of a float32 significand that tf32 has not
_TF32_MASK = np.uint32(0xFFFFE000)


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """Values of bfloat16 bit patterns."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Bit patterns of float32 values rounded to bfloat16, to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def to_tf32(values: np.ndarray, rounding: str) -> np.ndarray:
    """float32 values cut to tf32: "trunc"ated, or rounded to nearest even by "rne"."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    if rounding == "rne":
        bits = bits + np.uint32(0xFFF) + ((bits >> _TF32_BITS) & 1)
    return (bits & _TF32_MASK).view(np.float32)
