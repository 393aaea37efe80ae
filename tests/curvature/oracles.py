"""Slow and obviously right: dense matrices from float64 gradients, one at a time."""

import torch

STEP = 1e-5  # central differences of float64 gradients: errors of about 1e-9


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def gradient(model, loss, batch):
    parameters = trainable(model)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        value = loss(model, batch)
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    parts = [
        torch.zeros_like(p) if g is None else g
        for g, p in zip(grads, parameters, strict=True)
    ]
    return torch.cat([part.reshape(-1) for part in parts])


def _moved(model, entry, amount, compute):
    """What `compute` gives with one scalar parameter moved."""
    for parameter in trainable(model):
        if entry < parameter.numel():
            flat = parameter.data.view(-1)
            before = flat[entry].clone()
            flat[entry] += amount
            try:
                return compute()
            finally:
                flat[entry] = before
        entry -= parameter.numel()
    raise IndexError(entry)


def _jacobian(model, compute):
    size = sum(p.numel() for p in trainable(model))
    columns = [
        (_moved(model, i, STEP, compute) - _moved(model, i, -STEP, compute))
        / (2 * STEP)
        for i in range(size)
    ]
    return torch.stack(columns, dim=-1)


def hessian(model, loss, batches, weights):
    """Mean over samples of the Hessians of batches with these numbers of samples."""
    total = 0
    for batch, weight in zip(batches, weights, strict=True):
        total = total + weight * _jacobian(
            model, lambda b=batch: gradient(model, loss, b)
        )
    return total / sum(weights)


def gauss_newton(model, outputs, loss, batches, weights):
    total = 0
    for batch, weight in zip(batches, weights, strict=True):
        with torch.no_grad():
            z = outputs(model, batch)
        inner = torch.autograd.functional.hessian(lambda o, b=batch: loss(o, b), z)
        with torch.no_grad():
            jacobian = _jacobian(model, lambda b=batch: outputs(model, b).flatten())
        inner = inner.reshape(z.numel(), z.numel())
        total = total + weight * jacobian.T @ inner @ jacobian
    return total / sum(weights)


def covariance(model, losses, batches):
    rows = []
    for batch in batches:
        rows += [
            gradient(model, lambda m, b, n=n: losses(m, b)[n], batch)
            for n in range(len(losses(model, batch)))
        ]
    return torch.stack(rows).T.cov()
