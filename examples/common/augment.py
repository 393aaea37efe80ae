"""Random shifts and flips of images, each sample its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["shift_and_flip"]


def shift_and_flip(
    images: Tensor, generator: torch.Generator, most: int = 4, *, flip: bool = True
) -> Tensor:
    """Shift each image by up to `most` pixels each way, and flip every other one.

    That is a crop of the image padded with 0 (the mean pixel, after normalisation).
    Numbers are drawn on the device of the generator: with one on the CPU they are the
    same whatever the images are on.

    Args:
        images: [samples, channels, height, width], on any device.
        generator: where the numbers come from.
        most: pixels, up, down, left and right.
        flip: left to right, with probability 1/2.
    """
    count, _, height, width = images.shape
    source = {"generator": generator, "device": generator.device}
    offsets = torch.randint(0, 2 * most + 1, (2, count), **source)
    is_flipped = torch.randint(0, 2, (count,), **source).bool() & flip
    offsets, is_flipped = offsets.to(images.device), is_flipped.to(images.device)
    columns = torch.arange(width, device=images.device).expand(count, -1)
    columns = torch.where(is_flipped[:, None], columns.flip(1), columns)
    columns = columns + offsets[1][:, None]
    rows = torch.arange(height, device=images.device) + offsets[0][:, None]
    padded = F.pad(images, (most, most, most, most)).movedim(1, 3)
    sample = torch.arange(count, device=images.device)[:, None, None]
    return padded[sample, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
