"""Models with data: every way a parameter can meet a sample that users write."""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass(frozen=True)
class Case:
    """A model builder, a batch builder and the per-sample losses."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple]
    call: Callable = lambda model, *inputs: model(*inputs)
    universal: bool = False  # some parameter has no rule of its own

    def make(self, seed=0, device=None):
        """The model and a batch, moved to `device` if that is said."""
        torch.manual_seed(seed)
        model, inputs = self.build(), self.inputs()
        if device is None:
            return model, inputs
        return model.to(device), tuple(t.to(device) for t in inputs)

    def losses(self, model, batch):
        out = self.call(model, *batch)
        out = out.flatten(1)
        # Different for each sample and each output, so that no symmetry hides a mistake.
        weight = torch.linspace(
            0.5, 1.5, out.shape[1], dtype=out.dtype, device=out.device
        )
        return (out * weight).sin().sum(1)


class Scaled(nn.Module):
    """Scale and shift of every broadcast shape."""

    def __init__(self, *shape):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(shape) + 2)
        self.shift = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return x.tanh() * self.scale + self.shift


class ClassToken(nn.Module):
    def __init__(self, repeat=False):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.position = nn.Parameter(torch.randn(1, 5, 6))
        self.layer = nn.Linear(6, 3)
        self.repeat = repeat

    def forward(self, x):
        token = (
            self.token.repeat(len(x), 1, 1)
            if self.repeat
            else self.token.expand(len(x), -1, -1)
        )
        return self.layer((torch.cat([token, x], 1) + self.position).tanh())


class Language(nn.Module):
    """Token and position tables, a head that may be tied."""

    def __init__(self, tied, padding_idx=None):
        super().__init__()
        self.tokens = nn.Embedding(11, 6, padding_idx=padding_idx)
        self.positions = nn.Embedding(5, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids):
        where = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.positions(where)
        return self.head(self.norm(x.tanh()))


class Columns(nn.Module):
    """Attention along the columns of images whose sizes are numbers beside them."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, pixels, height, width):
        x = pixels.unflatten(1, (height, width)).transpose(0, 1)
        out = x.reshape(height, -1, 8)
        out = self.attention(out, out, out, need_weights=False)[0]
        return out.view(x.shape).transpose(0, 1).flatten(1, 2)


class Reused(nn.Module):
    """One layer three times over, once after a transpose."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        x = self.layer(x).tanh()
        x = self.layer(x.transpose(1, 2)).transpose(1, 2) if x.shape[1] == 6 else x
        return self.layer(x)


class TransposedTie(nn.Module):
    """A matrix and its transpose."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return (x @ self.weight).tanh() @ self.weight.t()


class TiedOften(nn.Module):
    """A table looked up in three ways that is the head of two outputs."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.layer = nn.Linear(6, 6)

    def forward(self, ids):
        rows = self.table.weight.index_select(0, ids.flatten()).unflatten(0, ids.shape)
        x = self.layer(self.table(ids).tanh() * self.table.weight[ids.flip(1)] + rows)
        return F.linear(x, self.table.weight).tanh() + x.tanh() @ self.table.weight.T


class Formula(nn.Module):
    """One weight in a formula."""

    def __init__(self, shape, formula):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.formula = formula

    def forward(self, x):
        return self.formula(x, self.weight)


def halves(x, w):
    gate, value = w.T.chunk(2, 1)
    return (x @ gate).tanh() * (x @ value)


FORMULAS = {
    "permuted": ((4, 6), lambda x, w: x @ w.T),
    "permuted twice": ((6, 4), lambda x, w: x.tanh() @ w.T.T),
    "swapped": ((4, 6), lambda x, w: x @ w.mT.clone()),
    "three dims": ((6, 2, 2), lambda x, w: x @ w.permute(0, 2, 1).flatten(1)),
    "on the left": ((4, 6), lambda x, w: w @ x.mT),
    "on the left, 2d": ((4, 6), lambda x, w: (w @ x.flatten(0, 1).T).T.unflatten(0, x.shape[:2])),
    "einsum": ((4, 6), lambda x, w: torch.einsum("btd,pd->btp", x, w)),
    "einsum, weight first": ((4, 6), lambda x, w: torch.einsum("pd,btd->btp", w, x)),
    "einsum to heads": ((2, 6, 3), lambda x, w: torch.einsum("btd,hdk->bhtk", x, w)),
    "einsum per head": ((3, 2, 4), lambda x, w: torch.einsum("bthd,hdk->bthk", x.unflatten(2, (3, 2)), w)),
    "halves": ((4, 6), halves),
    "stepped": ((8, 6), lambda x, w: x @ w[::2].T + (x @ w[1::2].T).tanh()),
    "unbound": ((4, 6, 2), lambda x, w: x @ w.unbind(-1)[0].T + x @ w.select(-1, 1).T),
    "split": ((4, 8), lambda x, w: x @ w.split([2, 6], -1)[1].T),
    "squeezed": ((4, 1, 6), lambda x, w: F.linear(x, w.squeeze(1).clone())),
    "some rows": ((9, 6), lambda x, w: x @ w[2:6].T + x @ w[-4:].T),
    "convolved twice": ((3, 3, 3), lambda x, w: F.conv1d(F.conv1d(x, w).tanh(), w)),
    "of one row, twice": ((6, 6), lambda x, w: F.linear(F.linear(x[:, 0], w).tanh(), w)),
}  # fmt: skip


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(6, 2))
        self.b = nn.Parameter(torch.randn(2, 4))

    def forward(self, x):
        return x @ (self.a @ self.b)


class OnePlus(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return x * (1 + self.weight)


class Experts(nn.Module):
    """Rows routed to experts by their content, and scattered back."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.experts = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])

    def forward(self, x):
        rows = self.inner(x).flatten(0, 1)
        choice = (rows.detach().abs() * 7).sum(1).long() % 3
        out = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            where = torch.nonzero(choice == i).flatten()
            out = out.index_add(0, where, expert(rows[where]).tanh())
        return out.view_as(x)


class RowLoop(nn.Module):
    """A loop over samples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return torch.stack([self.layer(sample) for sample in x])


class ImageLoop(nn.Module):
    """A loop over images, with every normalisation."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.group = nn.GroupNorm(2, 4)
        self.layer = nn.LayerNorm((3, 3))

    def forward(self, x):
        images = [self.layer(self.group(self.conv(image[None]))) for image in x]
        return torch.cat(images)


class Unrolled(nn.Module):
    """A recurrent cell, used once a time step."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(6, 3)

    def forward(self, x):
        h = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return h


class LastToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x, length):
        h = self.layer(x).tanh()
        return self.head(h[torch.arange(len(x), device=x.device), length])


class Windows(nn.Module):
    """Windowed rows: the batch in the middle of a dimension."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):  # [batch, 4, 6] -> rows (2 windows, batch, 2 rows)
        batch = len(x)
        x = x.view(batch, 2, 2, 6).transpose(0, 1).reshape(2 * batch * 2, 6)
        x = self.layer(x[:, :3]).view(2, batch, 2, 2)
        return x.transpose(0, 1).reshape(batch, -1)


class Doubled(torch.autograd.Function):
    """A user's own autograd function with a parameter."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w * 2

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w * 2, (g * x * 2).sum(0)


class UsesDoubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return Doubled.apply(x, self.weight)


class Blended(nn.Module):
    """Inputs moved by a number of the way towards learned ends, and back."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.randn(3, 1))
        self.end = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return torch.lerp(self.start, torch.lerp(x, self.end, 0.3).tanh(), 0.4)


class Heads(nn.Module):
    """Projections by einsum, one matrix a head."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 2))
        self.mix = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        heads = torch.einsum("btd,hdk->bthk", x, self.weight)
        mixed = torch.einsum("btd,de->bte", x, self.mix)
        return heads.flatten(1).sum(1, keepdim=True) * mixed.flatten(1)


class RelativePositions(nn.Module):
    """A table of distances, looked up once and added to every sample's scores."""

    def __init__(self, where=False):
        super().__init__()
        self.table = nn.Embedding(9, 2)
        self.where = where

    def forward(self, x):  # [batch, 5, 6]
        place = torch.arange(x.shape[1], device=x.device)
        bias = self.table(place[:, None] - place + 4).permute(2, 0, 1)[None]
        if self.where:
            bias = torch.where((x[:, :, 0] < 0.5)[:, None, None], bias, -3.0)
        heads = x.unflatten(2, (2, 3)).transpose(1, 2)
        scores = (heads @ heads.mT) * 0.1
        return (scores + bias).softmax(-1) @ heads


class HiddenPositions(nn.Module):
    """Distances of what comes before, as in T5's decoder; a shift that is masked."""

    def __init__(self, *, fills):
        super().__init__()
        self.table = nn.Embedding(9, 2)
        self.shift = nn.Parameter(torch.randn(6))
        self.fills = fills

    def forward(self, x):  # [batch, 5, 6]
        place = torch.arange(x.shape[1], device=x.device)
        bias = self.table(place[:, None] - place + 4).permute(2, 0, 1)[None]
        later = (place > place[:, None])[None, None]
        odd = torch.arange(6, device=x.device) % 2 == 1
        if self.fills:
            bias = (-0.5 * bias).masked_fill(later, 0.0)
            shift = self.shift.masked_fill(odd, 0.0)
        else:
            bias = torch.where(later, torch.zeros_like(bias), bias)
            shift = torch.where(odd, self.shift, 0.0)
        heads = (x + shift).unflatten(2, (2, 3)).transpose(1, 2)
        return ((heads @ heads.mT) * 0.1 + bias).softmax(-1) @ heads


class Indexed(nn.Module):
    """Tables looked up by indexing, along one dim and two."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(7, 6))
        self.grid = nn.Parameter(torch.randn(3, 4, 2, 3))
        self.numbers = nn.Parameter(torch.randn(5))

    def forward(self, ids):  # [batch, 5] of 0 ... 6
        x = self.rows[ids - 7].tanh() + self.rows.index_select(
            0, torch.arange(5, device=ids.device)
        )
        grid = self.grid[ids % 3, ids % 4].flatten(2)
        return x * grid + self.numbers[ids % 5, None]


class MaskToken(nn.Module):
    """One vector in the place of some inputs, other ones in each sample."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(6))
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        x = x.clone()
        x[x[..., 0] > 0.3] = self.token.to(x.dtype)
        return self.layer(x)


class SortedExperts(nn.Module):
    """Rows sorted by expert, one grouped product, and back in order."""

    def __init__(self, grouped):
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.Parameter(torch.randn(3, 4, 8))
        self.bias = nn.Parameter(torch.randn(3, 4))
        self.grouped = grouped

    def forward(self, x):  # [batch, 5, 8]
        rows = x.flatten(0, 1)
        weight, choice = self.router(rows).softmax(-1).topk(2)
        expert, order = choice.flatten().sort()
        if self.grouped and x.dtype == torch.float32:
            ends = torch.bincount(expert, minlength=3).cumsum(0).int()
            matrices = self.experts.transpose(1, 2)
            out = F.grouped_mm(rows[order // 2], matrices, offs=ends)
        else:
            out = torch.bmm(self.experts[expert], rows[order // 2, :, None])[..., 0]
        out = (out + self.bias[expert]).tanh() * weight.flatten()[order, None]
        return out[order.argsort()].view(*choice.shape, 4).sum(1).view(*x.shape[:2], 4)


class Ensemble(nn.Module):
    """Members side by side, each with a matrix and a bias, in one product."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 4))
        self.bias = nn.Parameter(torch.randn(3, 1, 4))

    def forward(self, x):  # [batch, 2, 6]: rows (batch, 2) of each member's product
        rows = x.flatten(0, 1).expand(3, -1, -1)
        out = torch.baddbmm(self.bias, rows, self.weight)
        return out.transpose(0, 1).unflatten(0, x.shape[:2])


class Packed(nn.Module):
    """Parts of one matrix, apart or with rows in common."""

    def __init__(self, *cuts):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.cuts = cuts

    def forward(self, x):
        for cut in self.cuts:
            w = self.weight[cut]
            x = torch.cat(
                [x, (x[..., :6] @ (w.t() if w.dim() == 2 else w[:, None])).tanh()], -1
            )
        return x


def attention(model, x):
    return model(x, x, x, need_weights=False)[0]


def cross_attention(model, x, y):
    return model(x, y, y, need_weights=False)[0]


def first(model, x):
    return model(x)[0]


def rows(*shape):
    return lambda: (torch.randn(*shape),)


def ids(high, *shape):
    return lambda: (torch.randint(0, high, shape),)


def sequential(*layers):
    return lambda: nn.Sequential(*[layer() for layer in layers])


def linear(*args, **kwargs):
    return lambda: nn.Linear(*args, **kwargs)


def conv2d(*args, **kwargs):
    return lambda: nn.Conv2d(*args, **kwargs)


CASES = [
    Case("linear 2d", sequential(linear(6, 4), nn.ReLU, linear(4, 3)), rows(5, 6)),
    Case("linear no bias", sequential(linear(6, 4, bias=False)), rows(5, 6)),
    Case("linear 3d", sequential(linear(6, 4), nn.Tanh, linear(4, 3)), rows(5, 3, 6)),
    Case(
        "linear 4d",
        sequential(linear(6, 4), nn.Tanh, linear(4, 3, bias=False)),
        rows(5, 2, 3, 6),
    ),
    Case(
        "linear strided",
        sequential(linear(4, 3)),
        rows(5, 4, 6),
        lambda m, x: m(x.transpose(1, 2)),
    ),
    Case("bilinear", lambda: nn.Bilinear(6, 6, 2), rows(5, 6), lambda m, x: m(x, x)),
    Case(
        "conv2d",
        sequential(conv2d(3, 4, 3, padding=1), nn.ReLU, conv2d(4, 2, 3, stride=2)),
        rows(5, 3, 7, 6),
    ),
    Case(
        "conv2d inplace",
        sequential(
            conv2d(3, 4, 3, padding=1), lambda: nn.ReLU(inplace=True), conv2d(4, 2, 3)
        ),
        rows(5, 3, 7, 6),
    ),
    Case("conv2d groups", sequential(conv2d(4, 6, 3, groups=2, dilation=2)), rows(5, 4, 7, 8)),
    Case("conv2d depthwise", sequential(conv2d(4, 4, 3, groups=4)), rows(5, 4, 5, 5)),
    Case(
        "conv1d",
        lambda: nn.Sequential(
            nn.Conv1d(3, 4, 3, padding=2, stride=2), nn.Tanh(), nn.Conv1d(4, 2, 2)
        ),
        rows(5, 3, 9),
    ),
    Case("conv3d", lambda: nn.Conv3d(2, 3, 2, padding=1), rows(3, 2, 4, 3, 5)),
    Case(
        "transposed conv2d",
        lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1, groups=1),
        rows(4, 3, 3, 4),
    ),
    Case("transposed conv1d", lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), rows(4, 4, 5)),
    Case(
        "frames",
        sequential(conv2d(3, 2, 3)),
        rows(3, 4, 3, 5, 5),
        lambda m, x: m(x.flatten(0, 1)).unflatten(0, x.shape[:2]),
    ),
    Case("layer norm", sequential(linear(6, 6), lambda: nn.LayerNorm(6)), rows(5, 3, 6)),
    Case("layer norm 2 dims", lambda: nn.LayerNorm((3, 6)), rows(5, 3, 6)),
    Case(
        "layer norm no bias",
        lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6, bias=False)),
        rows(5, 6),
    ),
    Case("rms norm", lambda: nn.Sequential(nn.Linear(6, 6), nn.RMSNorm(6)), rows(5, 3, 6)),
    Case(
        "group norm",
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)),
        rows(5, 3, 5, 5),
    ),
    Case(
        "instance norm",
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True)),
        rows(5, 3, 5, 5),
    ),
    Case(
        "batch norm eval",
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(),
        rows(5, 3, 5, 5),
    ),
    Case("scale last", lambda: Scaled(6), rows(5, 3, 6)),
    Case("scale scalar", lambda: Scaled(), rows(5, 3, 6)),
    Case("scale channel", lambda: Scaled(3, 1), rows(5, 3, 6)),
    Case("scale full", lambda: Scaled(3, 6), rows(5, 3, 6)),
    Case("scale keepdim", lambda: Scaled(1, 3, 1), rows(5, 3, 6)),
    Case("scale vector", lambda: nn.Sequential(Scaled(6)), rows(5, 6)),
    Case("blended", Blended, rows(5, 3, 6)),
    Case("class token", ClassToken, rows(5, 4, 6)),
    Case("class token repeat", lambda: ClassToken(repeat=True), rows(5, 4, 6)),
    Case("embedding", lambda: Language(False), ids(11, 4, 5)),
    Case("embedding padding", lambda: Language(False, padding_idx=2), ids(4, 4, 5)),
    Case("tied head", lambda: Language(True), ids(11, 4, 5)),
    Case("tied head padding", lambda: Language(True, padding_idx=2), ids(4, 4, 5)),
    Case("reused", Reused, rows(4, 6, 6)),
    Case("matrix and transpose", TransposedTie, rows(5, 3, 6)),
    Case("tied often", TiedOften, ids(9, 4, 5)),
    *[
        Case(f"weight {name}", lambda formula=formula: Formula(*formula), rows(5, 3, 6))
        for name, formula in FORMULAS.items()
    ],
    Case("low rank", LowRank, rows(5, 6)),
    Case("one plus", OnePlus, rows(5, 3, 6)),
    Case(
        "weight norm",
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)),
        rows(5, 2, 6),
    ),
    Case(
        "spectral norm",
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)).eval(),
        rows(5, 6),
    ),
    Case("mha batch first", lambda: nn.MultiheadAttention(6, 2, batch_first=True), rows(4, 3, 6), attention),
    Case(
        "mha time first",
        lambda: nn.MultiheadAttention(6, 2),
        rows(4, 3, 6),
        lambda m, x: attention(m, x.transpose(0, 1)).transpose(0, 1),
    ),
    Case(
        "mha cross",
        lambda: nn.MultiheadAttention(6, 2, kdim=4, vdim=4, batch_first=True),
        lambda: (torch.randn(4, 3, 6), torch.randn(4, 5, 4)),
        cross_attention,
    ),
    Case(
        "mha cross packed",
        lambda: nn.MultiheadAttention(6, 2, batch_first=True),
        lambda: (torch.randn(4, 3, 6), torch.randn(4, 5, 6)),
        cross_attention,
    ),
    Case(
        "encoder layer",
        lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
        rows(4, 3, 6),
    ),
    Case("lstm", lambda: nn.LSTM(6, 3, batch_first=True), rows(4, 5, 6), first, True),
    Case("gru", lambda: nn.GRU(6, 3, batch_first=True), rows(4, 5, 6), first),
    Case("prelu", lambda: nn.Sequential(nn.Linear(6, 4), nn.PReLU(4)), rows(5, 6)),
    Case("experts", Experts, rows(4, 5, 6)),
    Case("experts grouped", lambda: SortedExperts(True), rows(4, 5, 8)),
    Case("experts selected", lambda: SortedExperts(False), rows(4, 5, 8)),
    Case("ensemble", Ensemble, rows(5, 2, 6)),
    Case("rows apart", lambda: Packed(slice(0, 2), 2, slice(3, 6)), rows(4, 5, 6)),
    Case("rows in common", lambda: Packed(slice(0, 4), slice(2, 6), 3), rows(4, 5, 6)),
    Case("last row twice", lambda: Packed(-1, slice(0, 2), slice(-2, None), 5), rows(4, 5, 6)),
    Case("relative positions", RelativePositions, rows(4, 5, 6)),
    Case("relative positions, as many samples", RelativePositions, rows(5, 5, 6)),
    Case("relative positions masked", lambda: RelativePositions(where=True), rows(4, 5, 6)),
    Case("hidden positions", lambda: HiddenPositions(fills=False), rows(4, 5, 6)),
    Case("hidden positions filled", lambda: HiddenPositions(fills=True), rows(4, 5, 6)),
    Case("indexed tables", Indexed, ids(7, 4, 5)),
    Case("mask token", MaskToken, rows(4, 5, 6)),
    Case("loop over samples", RowLoop, rows(4, 6)),
    Case("loop over images", ImageLoop, rows(3, 3, 5, 5), universal=True),
    Case("unrolled", Unrolled, rows(4, 5, 6)),
    Case(
        "last token",
        LastToken,
        lambda: (torch.randn(4, 5, 6), torch.randint(0, 5, (4,))),
    ),
    Case("windows", Windows, rows(3, 4, 6)),
    Case("own function", UsesDoubled, rows(5, 6), universal=True),
    Case("einsum", Heads, rows(4, 3, 6)),
    Case(
        "mixed",
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
        ),
        rows(6, 3, 5, 5),
    ),
    Case("functional", lambda: nn.Linear(6, 6), rows(5, 6), lambda m, x: F.linear(F.linear(x, m.weight), m.weight, m.bias)),
]  # fmt: skip
