"""Tiny models with a batch of ten samples each, in float64."""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """Causal scaled-dot-product attention, written as users write it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.qkv = nn.Linear(4, 12)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = (
            t.unflatten(-1, (2, 2)).transpose(1, 2)
            for t in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + mixed.transpose(1, 2).flatten(2)).mean(dim=1)


class Tied(nn.Module):
    """One weight, used by the embedding and the head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)).mean(dim=1))


class Unreached(nn.Module):
    """Some parameters are never used, some are frozen."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(2, 2)
        self.first = nn.Linear(3, 4)
        self.first.bias.requires_grad_(False)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def _encoder():
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, batch_first=True)
    return nn.Sequential(
        nn.Embedding(5, 4), layer, nn.Flatten(), nn.Linear(12, 3)
    ).eval()


def _conv():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 2, 2, groups=1),
        nn.Flatten(),
        nn.Linear(2, 3),
    )


def _norm():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 3))


def _batchnorm():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))


def _mlp():
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3))


_IDS, _ROWS, _IMAGES = "ids", "rows", "images"
CASES = {
    "mlp": (_mlp, _ROWS),
    "conv": (_conv, _IMAGES),
    "layer_norm": (_norm, _ROWS),
    "batch_norm": (_batchnorm, _ROWS),
    "attention": (Attention, _IDS),
    "encoder": (_encoder, _IDS),
    "tied": (Tied, _IDS),
    "unreached": (Unreached, _ROWS),
}


def make(name, dtype=torch.float64, device="cpu"):
    """Model and batch (inputs, labels)."""
    torch.manual_seed(3)
    build, kind = CASES[name]
    model = build().to(dtype)
    inputs = {
        _IDS: lambda: torch.randint(5, (10, 3)),
        _ROWS: lambda: torch.randn(10, 3, dtype=dtype),
        _IMAGES: lambda: torch.randn(10, 2, 4, 4, dtype=dtype),
    }[kind]()
    return model.to(device), (inputs.to(device), torch.randint(3, (10,)).to(device))


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def outputs(model, batch):
    return model(batch[0])


def output_loss(predictions, batch):
    return F.cross_entropy(predictions, batch[1])


def unequal(batch):
    """The same ten samples as batches of 8 and 2."""
    x, y = batch
    return [(x[:8], y[:8]), (x[8:], y[8:])]
