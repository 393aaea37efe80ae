"""Embedding tables: against the float64 reference, a loop and autograd."""

import pytest
import torch
from torch.nn import functional as F

from fastminima.ops import embedding

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# batch, time, features, num_embeddings
SHAPES = [(3, 5, 7, 4), (1, 1, 1, 1), (2, 40, 33, 1000), (0, 3, 4, 5), (3, 0, 4, 5)]


def layouts(batch, time, width, dtype):
    yield torch.randn(batch, time, width).to(dtype)
    yield torch.randn(time, batch, width).to(dtype).transpose(0, 1)
    yield torch.randn(batch, width, time).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding_idx", [-1, 0])
def test_every_implementation(check, shape, padding_idx, dtype):
    batch, time, features, count = shape
    room = {"rtol": 1e-12 if dtype == torch.float64 else 2e-5, "atol": 1e-4}
    for g in layouts(batch, time, features, dtype):
        for ids in (
            torch.randint(count, (batch, time)),
            torch.randint(count, (time, batch)).T,
        ):
            case = (ids, g, padding_idx)
            check(embedding.embedding_sq_norms, *case, **room, nonnegative=True)
            check(embedding.embedding_gram, *case, **room)
            check(embedding.embedding_second_moment, *case, count, **room)
            check(embedding.embedding_gradients, *case, count, **room)
            v = torch.randn(count, features)
            check(embedding.embedding_dots, *case, v, **room)
            a = torch.randn(batch, 6, features).to(dtype)
            go = torch.randn(batch, 6, count).to(dtype)
            check(embedding.tied_cross, *case, a, go, **room)


@pytest.mark.parametrize("padding_idx", [-1, 2])
def test_references_against_autograd(padding_idx):
    ids, g = torch.randint(5, (4, 9)), torch.randn(4, 9, 3).double()
    a, go = torch.randn(4, 6, 3).double(), torch.randn(4, 6, 5).double()
    table = torch.randn(5, 3).double().requires_grad_()
    grads = []
    for n in range(4):
        out = F.embedding(ids[n], table, None if padding_idx < 0 else padding_idx)
        grads += torch.autograd.grad(out, table, g[n])
    grads = torch.stack(grads)
    flat = grads.flatten(1)
    case = (ids, g, padding_idx)
    v = torch.randn(5, 3).double()
    head = torch.einsum("nsv,nse->nve", go, a)
    for got, want in [
        (embedding.embedding_sq_norms.reference(*case), flat.square().sum(1)),
        (embedding.embedding_gram.reference(*case), flat @ flat.T),
        (embedding.embedding_second_moment.reference(*case, 5), grads.square().sum(0)),
        (embedding.embedding_gradients.reference(*case, 5), grads),
        (embedding.embedding_dots.reference(*case, v), flat @ v.flatten()),
        (embedding.tied_cross.reference(*case, a, go), (grads * head).sum((1, 2))),
    ]:
        torch.testing.assert_close(got, want)


def test_tied_cross_from_gathered_columns():
    ids, ge = torch.randint(5, (4, 9)), torch.randn(4, 9, 3)
    a, go = torch.randn(4, 6, 3), torch.randn(4, 6, 5)
    want = embedding.tied_cross(ids, ge, 2, a, go)
    columns = go.gather(2, ids.unsqueeze(1).expand(-1, 6, -1))
    places = torch.where(ids == 2, -1, torch.arange(9))
    torch.testing.assert_close(embedding.tied_cross(places, ge, -1, a, columns), want)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_sizes_that_occupy_several_threads(check, batch):
    ids, g = torch.randint(100, (batch, 600)), torch.randn(batch, 600, 333)
    check(embedding.embedding_sq_norms, ids, g, 7, rtol=1e-5, atol=0)
    a, go = torch.randn(batch, 61, 333).double(), torch.randn(batch, 61, 100).double()
    check(embedding.tied_cross, ids, g.double(), 7, a, go, rtol=1e-9, atol=1e-9)
