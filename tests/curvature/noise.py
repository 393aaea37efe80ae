"""A backward pass that is not the same twice: what the atomics of a GPU do."""

import itertools

import torch

EPS = {
    torch.float64: 1e-15,
    torch.float32: 1e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
}
_seeds = itertools.count()


def nodes_of(loss):
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [child for child, _ in node.next_functions]


def noisy(loss, factor):
    """The loss, with errors in the input gradients of products, new at each call."""
    generator = torch.Generator("cpu").manual_seed(next(_seeds))

    def perturb(grad):
        size = grad.abs().double().mean(-1, keepdim=True) if grad.dim() else grad.abs()
        noise = torch.randn(
            grad.shape, generator=generator, dtype=torch.float64, device="cpu"
        ).to(grad.device)
        return (grad.double() + EPS[grad.dtype] * factor * size * noise).to(grad.dtype)

    def hook(grad_inputs, _):
        return tuple(
            g if g is None or not g.is_floating_point() else perturb(g)
            for g in grad_inputs
        )

    for node in nodes_of(loss):
        if any(w in node.name() for w in ("Convolution", "Mm", "Bmm", "Index")):
            node.register_hook(hook)
    return loss
