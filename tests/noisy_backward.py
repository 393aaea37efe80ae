"""A backward pass that is not the same twice, on a CPU: what GPUs do with atomics.

On an H100 (torch 2.11) the input gradients of convolutions (cuDNN) and of attention
change from pass to pass by rounding. `noisy(loss)` makes every such node of a graph do
that: its input gradients get an error of `eps` times the mean magnitude along the last
dim, new in each pass.
"""

import torch

NAMES = ("Convolution", "ScaledDotProduct", "Bmm", "EmbeddingBag", "IndexPut")
# As measured on an H100, for a factor of one.
EPS = {
    torch.float32: 1e-6,
    torch.float64: 1e-15,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
}


def nodes_of(loss):
    """Every node above the leaves."""
    seen, stack = {}, [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen[node] = None
        stack += [child for child, _ in node.next_functions]
    return list(seen)


def noisy(loss, factor=1.0, names=NAMES, seed=0, only=None):
    """Make the chosen nodes of a graph inexact; returns the handles of the hooks.

    With `only`, a function of a pass's number from 0, in the passes that it picks.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    passes = [-1]

    def count(grads):
        passes[0] += 1

    def blurred(g):
        if only is not None and not only(passes[0]):
            return g
        if g is None or not g.is_floating_point() or g.layout != torch.strided:
            return g
        wide = g.float() if g.dtype != torch.float64 else g
        size = wide.abs().mean(-1, keepdim=True) if g.dim() else wide.abs()
        noise = torch.randn(g.shape, generator=generator, dtype=wide.dtype).to(g.device)
        return (wide + EPS[g.dtype] * factor * size * noise).to(g.dtype)

    def hook(grad_inputs, grad_outputs):
        return tuple(blurred(g) for g in grad_inputs)

    chosen = (n for n in nodes_of(loss) if any(name in n.name() for name in names))
    counter = loss.grad_fn.register_prehook(count)
    return [counter, *(node.register_hook(hook) for node in chosen)]
