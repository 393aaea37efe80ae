"""Random numbers from counters: the bits, and the distributions."""

import math

import pytest
import torch
from normality import check_moments, check_normal, check_uncorrelated

from fastminima.ops.random import Noise, normals, philox

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
CPU = torch.device("cpu")


def numbers(count, seed=0, step=0, index=0, first=0):
    noise = Noise(seed, step, [index], 1.0)
    return normals(noise, 0, slice(first, first + count), CPU)


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_known_answers(counter, key, want):
    words = philox([torch.tensor([c]) for c in counter], key)
    assert tuple(words[0].tolist()) == want


def test_counter_and_key_of_an_element():
    seed, step, index, element = 0x299F31D0A4093822, 0x0370734413198A2E, 0x5A1B, 6
    counter = [torch.tensor([c]) for c in (1, 0x5A1B << 8, 0x13198A2E, 0x03707344)]
    words = philox(counter, (0xA4093822, 0x299F31D0))[0]
    radius = math.sqrt(-2 * math.log((int(words[2]) + 0.5) / 2**32))
    angle = 2 * math.pi * int(words[3]) / 2**32
    got = numbers(2, seed, step, index, element)
    assert got[0].item() == pytest.approx(radius * math.cos(angle), rel=1e-9)
    assert got[1].item() == pytest.approx(radius * math.sin(angle), rel=1e-9)


@pytest.mark.parametrize(("first", "count"), [(0, 0), (0, 1), (3, 2), (4, 9), (98, 2)])
def test_numbers_do_not_depend_on_what_is_drawn_with_them(first, count):
    assert torch.equal(numbers(count, first=first), numbers(100)[first : first + count])


KEYS = [
    *((seed, 0, 0) for seed in (0, 1, 1 << 32, -1)),
    *((0, step, 0) for step in (1, 2, 1 << 32)),
    *((0, 0, index) for index in (1, 2, 1 << 22)),
]


def test_seeds_steps_and_tensors_have_streams_without_correlation():
    check_uncorrelated(torch.stack([numbers(50_000, *key) for key in KEYS]))


def test_distribution():
    drawn = numbers(400_000, 1, 2, 3)
    check_moments(drawn)
    for j in range(4):  # by place in a counter's four words
        check_normal(drawn[j::4])
    assert 4 < drawn.abs().max() < 6.8
