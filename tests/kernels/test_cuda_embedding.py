"""The CUDA kernels for embedding tables against the float64 references.

As in test_cuda_kernels.py: an emulated and a real device, several thread orders.
"""

import pytest
import torch
from cuda_tensors import ALL, FLOATS, same

from fastminima.ops import embedding
from fastminima.ops.cuda import embedding as embedding_cuda

# batch, time, features, num_embeddings
SHAPES = [(3, 5, 7, 4), (1, 1, 1, 1), (2, 40, 33, 1000), (0, 3, 4, 5), (3, 0, 4, 5)]
SHAPES += [(2, 100, 264, 3), (1, 33, 0, 5), (1, 9000, 3, 300_000)]


def embedding_cases(batch, time, width, count, dtype):
    """Ids and gradients, batch-major, time-major and with a strided width."""
    ids, g = torch.randint(count, (batch, time)), torch.randn(batch, time, width)
    yield ids, g.to(dtype)
    yield ids.T.contiguous().T, g.to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    yield ids, g.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("padding_idx", [-1, 0])
@pytest.mark.parametrize("shape", SHAPES)
def test_embedding(device, shape, padding_idx, dtype):
    count = shape[3]
    room = {"rtol": 1e-12 if dtype == torch.float64 else 2e-5, "atol": 1e-4}
    for ids, g in embedding_cases(*shape, dtype):
        v = torch.randn(count, shape[2])
        args = (ids, g.double(), padding_idx)
        want = [
            embedding.embedding_sq_norms.reference(*args),
            embedding.embedding_second_moment.reference(*args, count),
            embedding.embedding_dots.reference(*args, v.double()),
        ]
        args = (device.kernels, device.put(ids), device.put(g), padding_idx)
        v = device.put(v)
        got = device.every(
            lambda a=args, v=v: [
                embedding_cuda.embedding_sq_norms(*a),
                embedding_cuda.embedding_second_moment(*a, count),
                embedding_cuda.embedding_dots(*a, v),
            ]
        )
        for part, truth in zip(got, want, strict=True):
            assert part.dtype == (dtype if dtype in FLOATS else torch.float32)
            same(part, truth, **room)
        if shape[1] > 1000:
            break  # the layouts have been tried on small shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_v", [torch.float64, *ALL])
@pytest.mark.parametrize("time", [7, 8, 9, 33])
def test_directions_of_any_dtype(device, time, of_v, dtype):
    """Read as they are where they are as `g` or wide; rows of 16 bytes, and others."""
    ids = torch.randint(12, (2, time))
    for width in (3, 40, 264):
        g, v = torch.randn(2, time, width).to(dtype), torch.randn(12, width).to(of_v)
        want = embedding.embedding_dots.reference(ids, g.double(), 5, v.double())
        args = (device.put(ids), device.put(g), 5, device.put(v))
        got = device.every(
            lambda a=args: [embedding_cuda.embedding_dots(device.kernels, *a)]
        )
        same(got[0], want, rtol=2e-5, atol=1e-4)


def test_a_half_direction_is_not_copied():
    """It has the size of the table, which is far larger than what is read of it."""
    from bytes_held import held

    from tools.kernels.capturable import CudaStandIn

    ids, g = torch.zeros(2, 8).long(), torch.zeros(2, 8, 64).bfloat16()
    v = torch.zeros(5000, 64).bfloat16()
    stand_in = CudaStandIn()
    found = held(lambda: embedding_cuda.embedding_dots(stand_in, ids, g, -1, v))
    assert found.most < v.nbytes / 10


@pytest.mark.parametrize("time", [2, 31, 32, 33, 64, 500])
def test_ids_that_fill_whole_chunks(device, time):
    """One id throughout, and ids whose steps cross the chunks of a warp."""
    g = torch.randn(2, time, 40)
    for ids in (torch.zeros(2, time).long(), torch.arange(time).expand(2, -1) // 20):
        want = embedding.embedding_sq_norms.reference(ids, g.double(), -1)
        args = (device.put(ids), device.put(g), -1)
        got = device.every(
            lambda a=args: [embedding_cuda.embedding_sq_norms(device.kernels, *a)]
        )
        same(got[0], want, rtol=1e-5, atol=1e-5)
