"""Random numbers from counters: the bits, the distributions, the Langevin step."""

import math

import pytest
import torch

from fastminima.ops.random import (
    gaussian_fill_,
    langevin_step_,
    philox,
    rademacher_fill_,
)

# Counter, key and output of philox4x32-10 in Random123's tests/kat_vectors
# (https://github.com/DEShawResearch/random123).
KNOWN = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_known_answers(counter, key, want):
    words = philox([torch.tensor([c]) for c in counter], key)
    assert tuple(words[0].tolist()) == want


def test_counter_and_key_of_an_element():
    seed, offset, element = 0x299F31D0A4093822, 0x0370734413198A2E, 6
    counter = [torch.tensor([c]) for c in (1, 0, 0x13198A2E, 0x03707344)]
    words = philox(counter, (0xA4093822, 0x299F31D0))[0]
    signs = rademacher_fill_(torch.empty(7), seed, offset)
    assert signs[element] == (-1 if words[2] >> 31 else 1)
    normal = gaussian_fill_(torch.empty(7, dtype=torch.float64), seed, offset)
    radius, angle = (
        math.sqrt(-2 * math.log((int(words[2]) + 0.5) / 2**32)),
        2 * math.pi * int(words[3]) / 2**32,
    )
    assert normal[element].item() == pytest.approx(radius * math.cos(angle), rel=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (), (5,), (3, 7)])
def test_the_start_of_a_stream_does_not_depend_on_its_length(shape, dtype):
    for fill in (gaussian_fill_, rademacher_fill_):
        long = fill(torch.empty(100, dtype=dtype), 3, 4)
        out = torch.empty(shape, dtype=dtype)
        assert fill(out, 3, 4) is out
        assert torch.equal(out.flatten(), long[: out.numel()])


def test_seeds_and_offsets_give_other_numbers():
    keys = [(0, 0), (1, 0), (0, 1), (1 << 32, 0), (0, 1 << 32), (-1, 0)]
    drawn = [gaussian_fill_(torch.empty(64), *key) for key in keys]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert (a != b).all()


def test_distributions():
    count = 400_000
    normal = gaussian_fill_(torch.empty(count, dtype=torch.float64), 1, 2)
    error = 1 / math.sqrt(count)
    # Standard errors of the first four moments of a normal distribution.
    for power, want, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        got = (normal**power).mean().item()
        assert abs(got - want) < 4 * math.sqrt(spread) * error
    assert abs((normal[::2] * normal[1::2]).mean()) < 4 * math.sqrt(2) * error
    signs = rademacher_fill_(torch.empty(count), 1, 2)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 4 * error


def test_langevin_step_adds_numbered_noise():
    params = [torch.randn(3), torch.randn(0), torch.randn(2, 5)]
    grads = [torch.randn_like(p) for p in params]
    noise = gaussian_fill_(torch.empty(16, dtype=torch.float64), 7, 8)
    want = [
        params[0] - 0.1 * grads[0] + 0.5 * noise[:3],
        params[1].clone(),
        params[2] - 0.1 * grads[2] + 0.5 * noise[4:14].view(2, 5),
    ]
    langevin_step_(params, grads, 0.1, 0.5, 7, 8)
    for got, truth in zip(params, want, strict=True):
        torch.testing.assert_close(got, truth.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_langevin_step_without_noise_is_gradient_descent(dtype):
    param, grad = torch.randn(50).to(dtype), torch.randn(50).to(dtype)
    want = (param.double() - 0.3 * grad.double()).to(dtype)
    langevin_step_([param], [grad], 0.3, 0.0, 1, 2)
    torch.testing.assert_close(param, want)
