"""The networks of the benchmark workloads, built from plain `torch.nn` layers.

Every weight sits in a standard layer that is called once on a batch-first tensor, so
that libraries which hook modules can take part.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "GPT2",
    "Decoder",
    "DecoderBlock",
    "ResNet20",
    "mlp",
    "narrow_gpt2",
    "small_convnet",
    "vgg11",
]

VGG11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")


def mlp() -> nn.Sequential:
    """784-512-512-512-10 with ReLU (W1, W1L)."""
    widths = (784, 512, 512, 512)
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def small_convnet() -> nn.Sequential:
    """Three convolutions, each with ReLU and 2x2 max pooling, on 3x32x32 (W2)."""
    layers: list[nn.Module] = []
    for d_in, d_out, size in ((3, 32, 5), (32, 64, 3), (64, 64, 3)):
        layers += [
            nn.Conv2d(d_in, d_out, size, padding=size // 2),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10))


def vgg11() -> nn.Sequential:
    """VGG-11 without batch-norm, with in-place ReLUs, on 3x32x32 (W3)."""
    layers: list[nn.Module] = []
    d_in = 3
    for entry in VGG11:
        if entry == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(d_in, entry, 3, padding=1), nn.ReLU(inplace=True)]
        d_in = entry
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm(8) and a shortcut."""

    def __init__(self, d_in: int, d_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(d_in, d_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(8, d_out)
        self.conv2 = nn.Conv2d(d_out, d_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(8, d_out)
        self.shortcut = (
            nn.Identity()
            if d_in == d_out and stride == 1
            else nn.Conv2d(d_in, d_out, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(out)) + self.shortcut(x)).relu()


class ResNet20(nn.Module):
    """ResNet-20 with GroupNorm(8) after each 3x3 convolution, on 3x32x32 (W4)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(8, 16)
        blocks = []
        d_in = 16
        for d_out, first_stride in ((16, 1), (32, 2), (64, 2)):
            for i in range(3):
                blocks.append(BasicBlock(d_in, d_out, first_stride if i == 0 else 1))
                d_in = d_out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.blocks(self.norm(self.conv(x)).relu())
        return self.head(out.mean(dim=(2, 3)))


class DecoderBlock(nn.Module):
    """Pre-norm block: causal attention with packed projections, then a GELU MLP."""

    is_causal = True

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def attend(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = (
            part.view(batch, time, self.heads, -1).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=2)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        return self.projection(out.transpose(1, 2).reshape(batch, time, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """Four pre-norm blocks, learned positions, an untied head without bias (W5)."""

    def __init__(self, vocabulary=2048, time=128, width=256, heads=4, depth=4):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(time, width)
        self.blocks = nn.Sequential(
            *(DecoderBlock(width, heads, 4 * width) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        # One row of positions a sample: a lookup shared by the batch would hide from
        # libraries that hook modules which sample a row belongs to.
        positions = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
        x = self.tokens(ids) + self.positions(positions)
        return self.head(self.norm(self.blocks(x)))


class GPT2(Decoder):
    """GPT-2's width, vocabulary, tied head and start, with four of 12 blocks (W6)."""

    def __init__(self, vocabulary=50257, time=64, width=768, heads=12, depth=4):
        super().__init__(vocabulary, time, width, heads, depth)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.head.weight = self.tokens.weight


def narrow_gpt2(width: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A GPT-2 of 12 layers where Python is all that counts, and losses of a batch."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=12,
        n_embd=width,
        n_head=2,
        vocab_size=64,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config).train()
    ids = torch.randint(64, (4, 16))

    def losses() -> Tensor:
        logits = model(ids).logits
        return nn.functional.cross_entropy(logits.mT, ids, reduction="none").mean(1)

    return model, losses
