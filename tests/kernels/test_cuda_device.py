"""What only a real device shows: PyTorch's streams, and graphs."""

import pytest
import torch

from fastminima import _native
from fastminima.ops.embedding import embedding_sq_norms
from fastminima.ops.multi import multi_sq_norm
from fastminima.ops.vector import lanczos_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        _native.cuda_kernels() is None, reason=str(_native.cuda_missing_reason())
    ),
]


def on_cuda(op, dtype=torch.float32):
    return op.on("cuda", "cuda", dtype)


def test_kernels_wait_for_the_current_stream():
    """On a stream that is busy, a launch elsewhere would read what is not there yet."""
    stream = torch.cuda.Stream()
    x = torch.zeros(1 << 20, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.fill_(1)
        got = on_cuda(multi_sq_norm)([x])
    stream.synchronize()
    assert got.item() == x.numel()


def captured(case):
    """A graph of `case`, and what it returned."""
    case()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = case()
    return graph, result


def test_a_graph_of_steps_gives_the_bits_of_a_launch():
    w, v, u = (torch.randn(100_003, device="cuda") for _ in range(3))
    beta = torch.tensor(0.5, dtype=torch.float64, device="cuda")
    moved = torch.empty_like(w)
    want = on_cuda(lanczos_step)(w.clone(), v, u, beta)

    graph, got = captured(lambda: on_cuda(lanczos_step)(moved.copy_(w), v, u, beta))
    graph.replay()
    assert torch.equal(got, want)

    ids = torch.randint(50, (4, 5000), device="cuda")
    g = torch.randn(4, 5000, 64, device="cuda")
    run = on_cuda(embedding_sq_norms, torch.int64)
    want = run(ids, g, -1)
    graph, got = captured(lambda: run(ids, g, -1))
    graph.replay()
    assert torch.equal(got, want)
