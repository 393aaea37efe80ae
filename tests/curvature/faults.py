"""Models and closures with one fault each, and the line of an audit that finds it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def sample(device):
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float32, device="cpu")
    y = torch.randint(0, 3, (20,), generator=generator, device="cpu")
    return x.to(device), y.to(device)


def net(*middle):
    return nn.Sequential(nn.Linear(6, 16), *middle, nn.Linear(16, 3))


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


class _Detached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.detach().tanh() ** 2)


class _Scaled(_Detached):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 0.9 * g * (1 - x.tanh() ** 2)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


class _Once(torch.autograd.Function):
    """Marked in a way that the mark cannot be read from the function."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    @once_differentiable
    def backward(ctx, g):
        return 2 * g


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x).tanh()


class Hooked(nn.Module):
    def forward(self, x):
        x = x.tanh()
        x.register_hook(lambda g: 0.5 * g)
        return x


class Clipped(nn.Module):
    def forward(self, x):
        x = x.tanh()
        x.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        return x


class OwnGenerator(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = torch.Generator("cpu").manual_seed(0)

    def forward(self, x):
        return x + 0.1 * torch.randn(x.shape, generator=self.own, device="cpu").to(x)


class Reentrant(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=True)


class Distances(nn.Module):
    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        return torch.cdist(x, self.centres, p=1.0)


class FusedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.v, self.g = (
            nn.Parameter(torch.randn(16, 16)),
            nn.Parameter(torch.ones(16, 1)),
        )

    def forward(self, x):
        return F.linear(x, torch.ops.aten._weight_norm_interface(self.v, self.g, 0)[0])


def _with_backward(model, batch):
    loss(model, batch).backward()
    return loss(model, batch)


def _with_steps(model, batch):
    model[0].weight.data.mul_(0.9)
    return loss(model, batch)


def _with_root(model, batch):
    return loss(model, batch) + (model[0].weight * 0).square().sum().sqrt()


@dataclass(frozen=True)
class Fault:
    make: Callable[[], nn.Module]
    line: str
    says: str
    loss: Callable[[Any, Any], torch.Tensor] = loss


FAULTS = {
    "detached backward": Fault(
        lambda: net(Apply(_Detached.apply)), "functions", "DetachedBackward.*layer '0'"
    ),
    "once differentiable": Fault(
        lambda: net(Apply(_Once.apply)), "functions", "OnceBackward.*layer '0'"
    ),
    "scaled backward": Fault(
        lambda: net(Apply(_Scaled.apply)), "gradient", "not the derivative of the loss"
    ),
    "straight through": Fault(
        lambda: net(nn.Tanh(), Apply(_Straight.apply)), "gradient", "straight-through"
    ),
    "half of it detached": Fault(
        lambda: net(Apply(lambda x: x * x.detach())), "differences", "0.weight"
    ),
    "scaling hook": Fault(lambda: net(Hooked()), "differences", "apart at .*hooks"),
    "clipping hook": Fault(lambda: net(Clipped()), "symmetry", "hooks on activations"),
    "own generator": Fault(lambda: net(OwnGenerator()), "loss twice", "generators"),
    "reentrant": Fault(
        lambda: net(Reentrant()), "second derivatives", "use_reentrant=False"
    ),
    "no second derivative": Fault(
        lambda: net(Distances()), "recording", "CdistBackward0.*layer '1', 1.centres"
    ),
    "fused weight norm": Fault(
        lambda: net(FusedNorm()), "second derivatives", "layer '1'.*torch._weight_norm"
    ),
    "calls backward": Fault(
        lambda: net(nn.Tanh()), "closures", "calls backward itself", _with_backward
    ),
    "overwrites": Fault(
        lambda: net(nn.Tanh()), "closures", "overwrites parameters", _with_steps
    ),
    "root of zero": Fault(lambda: net(nn.Tanh()), "products", "Roots", _with_root),
}
