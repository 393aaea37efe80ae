"""A Llama, a vision transformer and ResNet-50 in plain PyTorch, of any size.

So that what is timed on a GPU needs no other package. GPT-2 is in `benchmarks.models`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models import DecoderBlock

__all__ = ["Llama", "ResNet50", "VisionTransformer"]


def _rotated(x: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary positions of `[batch, heads, time, d]`."""
    time, half = x.shape[2], x.shape[3] // 2
    places = torch.arange(time, device=x.device, dtype=torch.float32)
    steps = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angles = places[:, None] * base**-steps
    cos, sin = (f(angles).to(x.dtype) for f in (torch.cos, torch.sin))
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class LlamaBlock(nn.Module):
    """Grouped-query attention with rotary positions, then a gated MLP; no biases."""

    def __init__(self, width: int, hidden: int, heads: int, groups: int):
        super().__init__()
        self.heads, self.groups, size = heads, groups, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
        self.q = nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, groups * size, bias=False) for _ in range(2))
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def attend(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape

        def split(y: Tensor, heads: int) -> Tensor:
            return y.view(batch, time, heads, -1).transpose(1, 2)

        q = _rotated(split(self.q(x), self.heads))
        k = _rotated(split(self.k(x), self.groups))
        v = split(self.v(x), self.groups)
        k, v = (self._for_each_head(y) for y in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.transpose(1, 2).reshape(batch, time, width))

    def _for_each_head(self, y: Tensor) -> Tensor:
        batch, groups, time, size = y.shape
        shape = batch, groups, self.heads // groups, time, size
        return y[:, :, None].expand(shape).reshape(batch, self.heads, time, size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """Token table, blocks, norm and an untied head; the sizes of 0.3B by default."""

    def __init__(
        self, vocabulary=32000, width=1024, hidden=2816, heads=16, groups=4, depth=16
    ):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(
            *(LlamaBlock(width, hidden, heads, groups) for _ in range(depth))
        )
        self.norm = nn.RMSNorm(width, 1e-5)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(ids))))


class _Seeing(DecoderBlock):
    """A pre-norm block whose attention is not causal."""

    is_causal = False


class VisionTransformer(nn.Module):
    """Patches of 16, a class token, pre-norm blocks; ViT-B/16 by default."""

    def __init__(self, image=224, width=768, heads=12, depth=12, classes=1000):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.start = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, (image // 16) ** 2 + 1, width))
        self.blocks = nn.Sequential(
            *(_Seeing(width, heads, 4 * width) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.start.expand(len(x), -1, -1), x], dim=1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


class Bottleneck(nn.Module):
    """Convolutions of 1, 3 and 1 with GroupNorm(32), and a shortcut."""

    def __init__(self, d_in: int, width: int, stride: int):
        super().__init__()
        d_out = 4 * width
        self.conv1 = nn.Conv2d(d_in, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.conv3 = nn.Conv2d(width, d_out, 1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(32, width), nn.GroupNorm(32, width)
        self.norm3 = nn.GroupNorm(32, d_out)
        self.shortcut: nn.Module = nn.Identity()
        if d_in != d_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(d_in, d_out, 1, stride, bias=False), nn.GroupNorm(32, d_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm1(self.conv1(x)).relu()
        out = self.norm2(self.conv2(out)).relu()
        return (self.norm3(self.conv3(out)) + self.shortcut(x)).relu()


class ResNet50(nn.Module):
    """ResNet-50 with GroupNorm(32); fewer blocks where `blocks` says so."""

    def __init__(self, blocks=(3, 4, 6, 3), classes=1000):
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.norm = nn.GroupNorm(32, 64)
        layers, d_in = [], 64
        for stage, count in enumerate(blocks):
            for i in range(count):
                width = 64 << stage
                layers.append(Bottleneck(d_in, width, 2 if i == 0 and stage else 1))
                d_in = 4 * width
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(d_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm(self.conv(x)).relu(), 3, 2, padding=1)
        return self.head(self.blocks(x).mean(dim=(2, 3)))
