"""Models and batches whose uses are launched, and what is launched of them."""

import torch
from torch import nn

__all__ = [
    "N",
    "Net",
    "T",
    "assert_captured",
    "data",
    "launched_nodes",
    "losses_of",
    "warm_up",
]

N, T = 6, 5


class Net(nn.Module):
    """Layers of sequences, and one with a row a sample."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.bare = nn.Linear(16, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(self.first(x).tanh())
        return self.head(self.bare(x).mean(1))


def losses_of(model, x):
    return model(x).square().sum(1)


def data(step, n=N):
    return torch.randn(n, T, 8, generator=torch.Generator().manual_seed(step))


def launched_nodes(probe):
    """Nodes of a probe's only program that the extension launches, and all of them."""
    (structure,) = probe._reader._structures.values()
    (recipe,) = structure._recipes.values()
    (program,) = recipe.programs.values()
    return program.launched.nodes, set(program.use_at)


def warm_up(step, times):
    """Steps on a stream of their own, as before a CUDA graph is recorded."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            step()
    torch.cuda.current_stream().wait_stream(side)


def assert_captured(step, x):
    """A recorded step that is replayed on other data gives what the step gives."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        x.copy_(data(seed))
        graph.replay()
        replayed = captured.clone()
        assert torch.equal(replayed, step())
