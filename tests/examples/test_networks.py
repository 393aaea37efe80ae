"""Networks: sizes derived by hand, weights from the seed; and shifts and flips."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from examples.common import networks
from examples.common.augment import shift_and_flip
from examples.common.networks import NETWORKS, make


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_vgg11_has_the_parameters_of_its_layout():
    convolutions = 0
    channels = [3, 64, 128, 256, 256, 512, 512, 512, 512]
    for before, after in pairwise(channels):
        convolutions += 9 * before * after + after  # with bias
        convolutions += 2 * after  # scale and shift of the normalisation
    linear = 2 * (512 * 512 + 512) + 512 * 10 + 10
    model = networks.vgg11()
    assert count(model) == convolutions + linear == 9_756_426
    kinds = [type(m).__name__ for m in model]
    assert kinds.count("Conv2d") + kinds.count("Linear") == 11
    assert kinds.count("MaxPool2d") == 5
    assert kinds.count("Dropout") == 2
    assert all(m.p == 0.5 for m in model if isinstance(m, nn.Dropout))
    assert "Dropout" not in [type(m).__name__ for m in networks.vgg11(dropout=0)]
    # Five halvings leave one pixel of 32 x 32.
    assert model[:30](images(2, 3, 32, 32)).shape == (2, 512)
    assert model[:29](images(2, 3, 32, 32)).shape == (2, 512, 1, 1)


def test_resnet56_has_the_parameters_of_its_layout():
    def block(before, after):
        shortcut = before * after if before != after else 0
        return 2 * before + 9 * before * after + 2 * after + 9 * after**2 + shortcut

    want = 9 * 3 * 16  # first convolution
    for before, after in ((16, 16), (16, 32), (32, 64)):
        want += block(before, after) + 8 * block(after, after)
    want += 2 * 64 + 64 * 10 + 10  # last normalisation, and scores
    model = networks.resnet56()
    assert count(model) == want == 855_578
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert sum(m.kernel_size == (3, 3) for m in convolutions) == 55
    assert sum(m.kernel_size == (1, 1) for m in convolutions) == 2
    assert all(m.bias is None for m in convolutions)
    # The average is over 8 x 8 pixels.
    assert model[:-2](images(2, 3, 32, 32)).shape == (2, 64, 8, 8)


def test_a_block_is_the_sum_of_shortcut_and_inner():
    block = networks.Block(3, 5, 2)
    x = images(2, 3, 8, 8)
    assert block(x).shape == (2, 5, 4, 4)
    torch.testing.assert_close(block(x), block.shortcut(x) + block.inner(x))
    assert isinstance(networks.Block(4, 4, 1).shortcut, nn.Identity)


def test_a_depth_that_does_not_come_out_is_refused():
    with pytest.raises(ValueError, match="2 \\+ 6 n layers, not 57"):
        networks.resnet(57, (16, 32, 64))
    with pytest.raises(ValueError, match="not 2"):
        networks.resnet(2, (16, 32, 64))


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "vgg11"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 14, 14), (1, 8, 8)])
def test_every_network_takes_every_image(name, shape):
    x = images(2, *shape)
    model = make(name, 0, x, classes=7)
    scores = model(x)
    assert scores.shape == (2, 7)
    scores.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_weights_come_from_the_seed_alone():
    x = images(2, 1, 14, 14)
    torch.manual_seed(0)
    first = make("resnet8", 3, x)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    torch.testing.assert_close(torch.rand(3), drawn)
    second, other = make("resnet8", 3, x), make("resnet8", 4, x)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert not torch.equal(first[0].weight, other[0].weight)


def test_weights_have_the_deviation_of_he():
    model = make("vgg11", 0, images(1, 3, 32, 32))
    for m in model:
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            fan_in, n = m.weight[0].numel(), m.weight.numel()
            # The deviation of n normal numbers has a relative error of 1 / sqrt(2 n).
            error = 5 / math.sqrt(2 * n)
            assert m.weight.std().item() == pytest.approx(
                math.sqrt(2 / fan_in), rel=error
            )
            assert not m.bias.any()


def test_wrong_names_and_images_are_refused():
    with pytest.raises(ValueError, match="vgg12"):
        make("vgg12", 0, images(1, 3, 32, 32))
    with pytest.raises(ValueError, match="\\[5, 64\\]"):
        make("resnet8", 0, images(5, 64))


@pytest.mark.parametrize("flip", [True, False])
def test_each_image_is_shifted_and_flipped_on_its_own(flip):
    x = images(40, 2, 6, 5)
    got = shift_and_flip(x, torch.Generator().manual_seed(2), 2, flip=flip)
    assert got.shape == x.shape
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    found = set()
    for n in range(len(x)):
        matches = [
            (down, right, flipped)
            for down in range(5)
            for right in range(5)
            for flipped in (False, True)
            for crop in [padded[n, :, down : down + 6, right : right + 5]]
            if torch.equal(crop.flip(2) if flipped else crop, got[n])
        ]
        assert len(matches) == 1, matches
        found.add(matches[0])
    assert len(found) > 15
    assert {f[2] for f in found} == ({True, False} if flip else {False})


def test_shifts_are_uniform_and_come_from_the_generator():
    x = torch.zeros(3600, 1, 9, 9)
    x[:, :, 4, 4] = 1
    generator = torch.Generator().manual_seed(0)
    got = shift_and_flip(x, generator)
    where = got.flatten(1).argmax(dim=1).bincount(minlength=81)
    # 3600 draws from 81 places: 44.4 expected, deviation 6.6.
    assert where.min() > 44.4 - 5 * 6.6 and where.max() < 44.4 + 5 * 6.6
    assert torch.equal(got, shift_and_flip(x, torch.Generator().manual_seed(0)))
    assert not torch.equal(got, shift_and_flip(x, generator))
