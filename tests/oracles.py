"""Slow and obviously right; imports nothing of the package."""

import copy

import torch


def single_sample_gradients(model, per_sample_loss, batch):
    """Gradient of each sample's own loss, `{name: [N, *shape]}`, in float64.

    `per_sample_loss(model, batch)` returns `[N]`; each sample is run as a batch of one.
    """
    model = copy.deepcopy(model).double()
    tensors = [to_double(t) for t in batch]
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = {name: [] for name in named}
    for n in range(len(tensors[0])):
        one = [t[n : n + 1] for t in tensors]
        (loss,) = per_sample_loss(model, one)
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for (name, p), g in zip(named.items(), grads, strict=True):
            found[name].append(torch.zeros_like(p) if g is None else g)
    return {name: torch.stack(gs) for name, gs in found.items()}


def flat(gradients):
    """`[N, P]` of a dict of per-sample gradients."""
    return torch.cat([g.reshape(len(g), -1) for g in gradients.values()], 1)


def to_double(t):
    return t.double() if t.is_floating_point() else t
