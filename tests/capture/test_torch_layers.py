"""Layers whose samples lie in odd places, against the float64 loop to 1e-5."""

import copy
import dataclasses
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracles import to_double
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastminima as fm

# A gradient counts as zero below this part of the largest parameter's.
NEGLIGIBLE = 1e-4


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer, its batch, and a call whose output has the samples first.

    `dims` has the batch dimension of each input, 0 unless given.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple]
    call: Callable = lambda model, *inputs: model(*inputs)
    dims: tuple[int, ...] = ()

    def losses(self, model, batch):
        out = self.call(model, *batch).flatten(1)
        weight = torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype)
        return (out * weight + 0.3).square().sum(1)

    def sample(self, batch, n):
        dims = self.dims or (0,) * len(batch)
        return [t.narrow(d, n, 1) for t, d in zip(batch, dims, strict=True)]


def rows(*shapes):
    return lambda: tuple(torch.randn(shape) for shape in shapes)


def ids(high, *shape):
    return lambda: (torch.randint(high, shape),)


def recurrent(model, x):
    """The outputs of all steps and the last state, `[batch, ...]`."""
    out, states = model(x)
    batch_dim = 0 if model.batch_first else 1
    states = states if isinstance(states, tuple) else (states,)
    parts = [out.movedim(batch_dim, 0), *(state.transpose(0, 1) for state in states)]
    return torch.cat([part.flatten(1) for part in parts], 1)


def time_first(model, *inputs):
    return model(*inputs).transpose(0, 1)


def packed(model, x, lengths):
    lengths = lengths.cpu()  # wherever x lies
    given = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    out, _ = model(given)
    return pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])[0]


def self_attention(model, x):
    return model(x, x, x)[0]


def masked_attention(model, q, kv, padding):
    out, weights = model(q, kv, kv, key_padding_mask=padding)
    return torch.cat([out.transpose(0, 1).flatten(1), weights.flatten(1)], 1)


def padded():
    lengths = torch.tensor([[4], [2], [3], [1]])
    return torch.randn(4, 4, 4), torch.randn(4, 4, 4), torch.arange(4) >= lengths


class Tied(nn.Module):
    """Bags and an output head share a table."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode
        self.table = nn.Parameter(torch.randn(5, 4))

    def forward(self, ids):
        return F.embedding_bag(ids, self.table, mode=self.mode) @ self.table.T


class Bags(nn.Module):
    """Each sample has three bags, flattened bag-major or sample-major."""

    def __init__(self, mode, padding_idx=None, bag_major=False):
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 4, mode=mode, padding_idx=padding_idx)
        self.bag_major = bag_major

    def forward(self, ids):  # [batch, 3, length]
        if self.bag_major:
            bags = self.bag(ids.transpose(0, 1).flatten(0, 1))
            return bags.view(3, -1, 4).transpose(0, 1)
        return self.bag(ids.flatten(0, 1)).view(-1, 3, 4)


class Learned(nn.Module):
    """An LSTM that learns its first states."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 3, 2)
        self.hidden = nn.Parameter(torch.randn(2, 1, 3))
        self.cell = nn.Parameter(torch.randn(2, 1, 3))

    def forward(self, x):  # [time, batch, 4]
        batch = x.shape[1]
        hidden = self.hidden.expand(-1, batch, -1).contiguous()
        return self.lstm(x, (hidden, self.cell.repeat(1, batch, 1)))[0]


def transformer(**options):
    return lambda: nn.Transformer(4, 2, 1, 1, 8, dropout=0.0, **options)


def recurrences():
    """RNN, GRU, LSTM in every form; all sizes of the input are four."""
    for kind, options in (
        (nn.RNN, {}),
        (nn.RNN, {"nonlinearity": "relu"}),
        (nn.GRU, {}),
        (nn.LSTM, {}),
        (nn.LSTM, {"proj_size": 2}),
    ):
        for batch_first in (False, True):
            for form in ({}, {"num_layers": 2, "bidirectional": True}, {"bias": False}):
                given = options | form | {"batch_first": batch_first}
                words = ", ".join(f"{k}={v}" for k, v in given.items())
                yield Layer(
                    f"{kind.__name__}({words})",
                    lambda kind=kind, given=given: kind(4, 3, **given),
                    rows((4, 4, 4)),
                    recurrent,
                    (0,) if batch_first else (1,),
                )


def weight_norm(layer, name="weight", dim=0):
    return parametrizations.weight_norm(layer, name, dim)


CUBE = rows((4, 4, 4))
BOTH = rows((4, 4, 4), (4, 4, 4))
LAYERS = [
    *recurrences(),
    Layer(
        "packed LSTM",
        lambda: nn.LSTM(4, 3, 2, bidirectional=True, batch_first=True),
        lambda: (torch.randn(4, 4, 4), torch.tensor([2, 4, 1, 4])),
        packed,
    ),
    Layer("LSTM that learns its states", Learned, CUBE, time_first, (1,)),
    Layer("LSTMCell", lambda: nn.LSTMCell(4, 3), rows((4, 4)), lambda m, x: m(x)[1]),
    Layer("GRUCell", lambda: nn.GRUCell(4, 3), rows((4, 4))),
    Layer("RNNCell", lambda: nn.RNNCell(4, 3), rows((4, 4))),
    Layer("Transformer", transformer(), BOTH, time_first, (1, 1)),
    Layer("Transformer batch_first", transformer(batch_first=True), BOTH),
    Layer(
        "Transformer norm_first",
        transformer(batch_first=True, norm_first=True, activation="gelu"),
        BOTH,
    ),
    Layer(
        "TransformerDecoder with a mask",
        lambda: nn.TransformerDecoder(
            nn.TransformerDecoderLayer(4, 2, 8, dropout=0.0), 2, nn.LayerNorm(4)
        ),
        BOTH,
        lambda m, x, y: time_first(m, x, y, torch.ones(4, 4).triu(1).bool()),
        (1, 1),
    ),
    Layer("MultiheadAttention", lambda: nn.MultiheadAttention(4, 2), CUBE,
          lambda m, x: self_attention(m, x).transpose(0, 1), (1,)),
    Layer("MultiheadAttention batch_first",
          lambda: nn.MultiheadAttention(4, 2, batch_first=True), CUBE, self_attention),
    Layer(
        "MultiheadAttention with everything",
        lambda: nn.MultiheadAttention(
            4, 2, kdim=4, vdim=4, add_bias_kv=True, add_zero_attn=True
        ),
        padded,
        masked_attention,
        (1, 1, 0),
    ),
    Layer("Bilinear", lambda: nn.Bilinear(3, 4, 2), rows((4, 3), (4, 4))),
    Layer("Bilinear over time", lambda: nn.Bilinear(3, 4, 2, bias=False),
          rows((4, 4, 3), (4, 4, 4)), time_first, (1, 1)),
    Layer("PReLU", nn.PReLU, CUBE),
    Layer("PReLU of each channel", lambda: nn.PReLU(3), rows((4, 3, 4, 4))),
    Layer("PReLU after PReLU",
          lambda: (lambda p: nn.Sequential(nn.Linear(4, 4), p, nn.Linear(4, 4), p))(
              nn.PReLU(4)), rows((4, 4))),
    Layer("weight_norm Linear", lambda: weight_norm(nn.Linear(4, 3)), CUBE),
    Layer("weight_norm of columns", lambda: weight_norm(nn.Linear(4, 3), dim=1), CUBE),
    Layer("weight_norm of all", lambda: weight_norm(nn.Linear(4, 3), dim=None), CUBE),
    Layer("weight_norm Conv", lambda: weight_norm(nn.Conv1d(4, 4, 3)), CUBE),
    Layer("weight_norm LSTM", lambda: weight_norm(nn.LSTM(4, 3), "weight_hh_l0"), CUBE,
          lambda m, x: m(x)[0].transpose(0, 1), (1,)),
    # In training mode each call of the model moves the estimate of the norm.
    Layer("spectral_norm Linear",
          lambda: parametrizations.spectral_norm(nn.Linear(4, 3)).eval(), CUBE),
    Layer("spectral_norm Conv",
          lambda: parametrizations.spectral_norm(nn.Conv1d(4, 4, 3)).eval(), CUBE),
    Layer("orthogonal", lambda: parametrizations.orthogonal(nn.Linear(4, 4)), CUBE),
    *[
        Layer(f"EmbeddingBag {mode}{words}", lambda mode=mode, options=options: Bags(
            mode, **options), ids(5, 4, 3, 4))
        for mode in ("sum", "mean", "max")
        for words, options in (
            ("", {}),
            (" padding", {"padding_idx": 1}),
            (" bag-major", {"bag_major": True}),
        )
    ],
    *[
        Layer(f"EmbeddingBag {mode}, tied", lambda mode=mode: Tied(mode), ids(5, 4, 6))
        for mode in ("sum", "mean", "max")
    ],
    Layer("EmbeddingBag weighted", lambda: nn.EmbeddingBag(5, 4, mode="sum"),
          lambda: (torch.randint(5, (4, 6)), torch.randn(4, 6)),
          lambda m, x, w: m(x, per_sample_weights=w)),
    Layer("InstanceNorm of running statistics",
          lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True).eval(),
          CUBE),
    Layer("GroupNorm of one group",
          lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.GroupNorm(1, 4)), CUBE),
]  # fmt: skip
BY_NAME = {layer.name: layer for layer in LAYERS}
assert len(BY_NAME) == len(LAYERS)


@pytest.fixture(params=list(BY_NAME))
def layer(request):
    return BY_NAME[request.param]


def test_against_single_samples(layer, device):
    torch.manual_seed(0)
    model, batch = layer.build(), layer.inputs()
    want = looped(layer, model, batch)
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        cast = copy.deepcopy(model).to(dtype)
        given = [t.to(dtype) if t.is_floating_point() else t for t in batch]
        got = probed(cast, layer.losses(cast, given), want)
        if device.type == "cuda" and error(got, want) >= bound > 1e-10:
            # cuDNN's recurrences are off by 2e-5: autograd's own gradients are too.
            want = differentiated(cast, layer.losses(cast, given))
        assert error(got, want) < bound, f"{layer.name}, {dtype}: {got} != {want}"


def test_other_statistics(layer):
    """Second moments, Gram matrix and dots, which no test above reads."""
    torch.manual_seed(0)
    model, batch = layer.build().double(), [to_double(t) for t in layer.inputs()]
    named = dict(model.named_parameters())
    losses = layer.losses(model, batch)
    grads = [
        torch.autograd.grad(loss, list(named.values()), retain_graph=True)
        for loss in losses
    ]
    rows = torch.stack([torch.cat([g.flatten() for g in found]) for found in grads])
    v = torch.randn(rows.shape[1], dtype=rows.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probe = fm.GradientProbe(
            model, measure=("second_moments", "gram"), directions={"v": v}
        )
        assert probe.audit(losses).ok
        stats = probe.backward(losses)
    moments = torch.cat([stats.second_moments[name].flatten() for name in named])
    torch.testing.assert_close(moments, rows.square().mean(0))
    torch.testing.assert_close(stats.gram, rows @ rows.T)
    torch.testing.assert_close(stats.dots["v"], rows @ v)


def looped(layer, model, batch):
    """|g_n| of each sample alone in float64, `{parameter: [batch]}`."""
    model = copy.deepcopy(model).double()
    named = dict(model.named_parameters())
    batch = [to_double(t) for t in batch]
    found = []
    for n in range(4):
        (loss,) = layer.losses(model, layer.sample(batch, n))
        grads = torch.autograd.grad(loss, list(named.values()))
        found.append(torch.stack([g.norm() for g in grads]))
    return dict(zip(named, torch.stack(found, 1), strict=True))


def differentiated(model, losses):
    """|g_n| of each sample by autograd, in the dtype of a graph of all of them."""
    named = dict(model.named_parameters())
    found = [
        torch.autograd.grad(loss, list(named.values()), retain_graph=True)
        for loss in losses
    ]
    norms = [torch.stack([g.double().norm() for g in grads]) for grads in found]
    return dict(zip(named, torch.stack(norms, 1), strict=True))


def probed(model, losses, names):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stats = fm.GradientProbe(model, per_parameter=True).backward(losses)
    found = stats.sq_norms_by_parameter
    return {name: found[name].double().sqrt() for name in names}


def error(got, want):
    """Worst relative error of a parameter's norms."""
    whole = max(norms.max() for norms in want.values())
    return max(
        (
            (got[name] - norms).abs().max() / norms.max().clamp_min(NEGLIGIBLE * whole)
        ).item()
        for name, norms in want.items()
    )
