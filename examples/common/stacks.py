"""Many small networks trained at once: replicas of one ReLU MLP, stacked.

A step of R replicas is a batched matrix product a layer, in place of R steps of R
networks that keep a processor busy with overhead. Each replica has its own weights,
learning rate and order of samples, all from its own seed, so that what becomes of it
does not depend on its stack (to rounding: a batched product adds up in another order).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Loss",
    "Stack",
    "cross_entropy",
    "make_mlp",
    "sgd_step",
    "squared_loss",
]

# Losses [replicas, batch] of scores [replicas, batch, classes], labels the same.
Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every sample, of whatever leading shape."""
    flat = F.cross_entropy(scores.flatten(0, -2), labels.flatten(), reduction="none")
    return flat.view(labels.shape)


def squared_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Half the squared distance from the one-hot label, of every sample."""
    target = F.one_hot(labels, scores.shape[-1]).to(scores.dtype)
    return (scores - target).square().sum(dim=-1) / 2


def make_mlp(sizes: Sequence[int], seed: int) -> nn.Sequential:
    """A ReLU MLP, its weights drawn as He et al. (2015) from `seed`, its biases 0.

    Twenty layers do not train from PyTorch's default, which shrinks the signal by
    sqrt(6) a layer; what the paper drew from is not known.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(sizes):
        linear = nn.Linear(d_in, d_out)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Stack:
    """Replicas of one ReLU MLP.

    Attributes:
        sizes: units of each layer, the input's first.
        params: weight [replicas, d_in, d_out] and bias [replicas, 1, d_out] of each
            layer in turn, leaves that require grad.
    """

    def __init__(self, sizes: Sequence[int], params: Sequence[Tensor]) -> None:
        self.sizes = tuple(sizes)
        self.params = [p.detach().clone().requires_grad_() for p in params]

    @classmethod
    def drawn(
        cls,
        sizes: Sequence[int],
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> Stack:
        """A replica a seed, each with the weights of `make_mlp` of that seed."""
        return cls.of([make_mlp(sizes, seed).to(device) for seed in seeds])

    @classmethod
    def of(cls, modules: Sequence[nn.Sequential]) -> Stack:
        """Copies of MLPs of one shape."""
        layers = [[m for m in module if isinstance(m, nn.Linear)] for module in modules]
        sizes = [layers[0][0].in_features, *(layer.out_features for layer in layers[0])]
        params = []
        for same in zip(*layers, strict=True):
            params.append(torch.stack([layer.weight.T for layer in same]))
            params.append(torch.stack([layer.bias[None] for layer in same]))
        return cls(sizes, params)

    def __len__(self) -> int:
        return len(self.params[0])

    def __call__(self, x: Tensor) -> Tensor:
        """Scores [replicas, batch, classes] of x [replicas or 1, batch, features]."""
        hidden = x.expand(len(self), -1, -1)
        for at in range(0, len(self.params), 2):
            hidden = torch.baddbmm(self.params[at + 1], hidden, self.params[at])
            if at + 2 < len(self.params):
                hidden = hidden.relu()
        return hidden

    def grads(self, losses: Tensor) -> list[Tensor]:
        """Gradient of each replica's mean loss; losses [replicas, batch]."""
        return list(torch.autograd.grad(losses.mean(dim=1).sum(), self.params))

    def module(self, replica: int) -> nn.Sequential:
        """A copy of one replica as an ordinary module."""
        module = make_mlp(self.sizes, 0).to(self.params[0].device)
        linears = [m for m in module if isinstance(m, nn.Linear)]
        with torch.no_grad():
            for at, linear in enumerate(linears):
                linear.weight.copy_(self.params[2 * at][replica].T)
                linear.bias.copy_(self.params[2 * at + 1][replica, 0])
        return module

    def kept(self, replicas: Tensor) -> Stack:
        """A stack of some of the replicas."""
        return Stack(self.sizes, [p.detach()[replicas] for p in self.params])

    def flat(self) -> Tensor:
        """Every replica's parameters, [replicas, parameters]."""
        return torch.cat([p.detach().flatten(1) for p in self.params], dim=1)

    @torch.no_grad()
    def scores(self, x: Tensor, piece: int = 2048) -> Tensor:
        """Scores of x [samples, features], without a graph and in pieces."""
        return torch.cat([self(part[None]) for part in x.split(piece)], dim=1)

    @torch.no_grad()
    def mean_loss(self, x: Tensor, y: Tensor, loss: Loss = cross_entropy) -> Tensor:
        """Each replica's mean loss on all of x, [replicas]."""
        return loss(self.scores(x), y.expand(len(self), -1)).mean(dim=1)

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> Tensor:
        """Each replica's share of right answers, [replicas]; y may be its own."""
        return (self.scores(x).argmax(dim=2) == y).float().mean(dim=1)


@torch.no_grad()
def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    rates: Tensor,
    velocities: Sequence[Tensor] | None = None,
    momentum: float = 0.0,
) -> None:
    """A step of SGD in place, each replica with its own rate; rates [replicas].

    With velocities, which it changes, that of `torch.optim.SGD`: v <- m v + g.
    """
    by_replica = rates[:, None, None]
    for at, (p, g) in enumerate(zip(params, grads, strict=True)):
        if velocities is not None:
            velocities[at].mul_(momentum).add_(g)
            g = velocities[at]
        p.addcmul_(by_replica, g, value=-1)
