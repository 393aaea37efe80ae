"""Convolutional networks of the papers, and small relatives of them for laptops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["NETWORKS", "make", "resnet", "resnet8", "resnet56", "vgg", "vgg11"]

# Channels of convolutions in turn; "M" halves the image.
VGG11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")


def vgg11(
    classes: int = 10, channels: int = 3, dropout: float = 0.5, width: float = 1.0
) -> nn.Sequential:
    """VGG-11 for images of 32 x 32: 8 convolutions and 3 linear layers.

    Read in code that authors of the paper published later: the order of convolutions
    and maxima, batch normalisation after each convolution, convolutions with bias, He's
    initialisation, hidden linear layers of 512, dropout .5 (and 0 in other code of
    theirs). Chosen here, for it was found nowhere: that "512-512-10" are three linear
    layers (which makes eleven), dropout before each of the two hidden ones, no batch
    normalisation there, and fan-in for He's deviation.

    Args:
        classes: number of scores.
        channels: of the images.
        dropout: share of units left out.
        width: factor on the number of channels and units.
    """
    layout = [at if at == "M" else _scaled(at, width) for at in VGG11]
    hidden = _scaled(512, width)
    return vgg(layout, (hidden, hidden), classes, channels, dropout)


def vgg(
    layout: Sequence[int | str],
    hidden: Sequence[int],
    classes: int = 10,
    channels: int = 3,
    dropout: float = 0.5,
) -> nn.Sequential:
    """A chain of 3 x 3 convolutions, and linear layers on the mean of what is left.

    What is left of an image of 32 x 32 after five maxima is one pixel. Images whose
    side is no power of two are rounded up when halved.

    Args:
        layout: channels of the convolutions in turn; "M" halves the image.
        hidden: units of the hidden linear layers.
        classes, channels, dropout: as in `vgg11`.
    """
    layers: list[nn.Module] = []
    for at in layout:
        if at == "M":
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            continue
        conv = nn.Conv2d(channels, int(at), 3, padding=1)
        layers += [conv, nn.BatchNorm2d(int(at)), nn.ReLU()]
        channels = int(at)
    layers.append(Average())
    for units in hidden:
        layers += [nn.Dropout(dropout)] if dropout else []
        layers += [nn.Linear(channels, units), nn.ReLU()]
        channels = units
    return nn.Sequential(*layers, nn.Linear(channels, classes))


def resnet56(classes: int = 10, channels: int = 3) -> nn.Sequential:
    """ResNet-56 in the pre-activation form, for images of 32 x 32.

    Read in code that authors of the paper published later: batch normalisation, ReLU,
    convolution, in this order and without bias; a 1 x 1 convolution without
    normalisation as the shortcut where the stride is 2; at the end normalisation, ReLU
    and the average over the 8 x 8 pixels; 16, 32 and 64 channels. Chosen here: that
    shortcut takes the input of the block before its normalisation, and weights are
    drawn as He et al. did, with fan-in.
    """
    return resnet(56, (16, 32, 64), classes, channels)


def resnet8(
    classes: int = 10, channels: int = 1, widths: Sequence[int] = (8, 16, 32)
) -> nn.Sequential:
    """A narrow ResNet with one block for each width."""
    return resnet(8, widths, classes, channels)


def resnet(
    depth: int, widths: Sequence[int], classes: int = 10, channels: int = 3
) -> nn.Sequential:
    """A pre-activation ResNet; see `resnet56`.

    Args:
        depth: 2 + 2 * len(widths) * n, for n blocks of each width.
        widths: channels of the stages; each but the first halves the image.
        classes: number of scores.
        channels: of the images.

    Raises:
        ValueError: for a depth that does not come out.
    """
    blocks, rest = divmod(depth - 2, 2 * len(widths))
    if rest or blocks < 1:
        raise ValueError(
            f"A ResNet of {len(widths)} stages has 2 + {2 * len(widths)} n layers, "
            f"not {depth}."
        )
    width = widths[0]
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
    for stage, wide in enumerate(widths):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers.append(Block(width, wide, stride))
            width = wide
    layers += [nn.BatchNorm2d(width), nn.ReLU(), Average()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


class Block(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x))))))."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.inner(x)


class Average(nn.Module):
    """The mean over all pixels; unlike adaptive pooling, deterministic on GPUs."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


# Those of the paper, then small ones; see `_network`.
NETWORKS = ("vgg11", "resnet56", "vgg11-narrow", "vgg5", "resnet20", "resnet8")


def make(
    name: str, seed: int, images: Tensor, classes: int = 10, **options: float
) -> nn.Sequential:
    """A network of `NETWORKS` on the CPU, drawn from a seed and nothing else.

    Args:
        name: see `NETWORKS`.
        seed: of the weights: normal of deviation sqrt(2 / fan-in), He et al. (2015);
            biases are 0 and normalisations the identity.
        images: [samples, channels, height, width], of which the channels are read.
        classes: number of scores.
        options: of the network, such as dropout.

    Raises:
        ValueError: for an unknown name, or images of another shape.
    """
    if name not in NETWORKS:
        raise ValueError(f"No network {name!r}; there are {', '.join(NETWORKS)}.")
    if images.dim() != 4:
        raise ValueError(
            "Images are [samples, channels, height, width], got a tensor of shape "
            f"{list(images.shape)}."
        )
    with torch.random.fork_rng(devices=[]):  # layers draw when they are made
        network = _network(name, classes, images.shape[1], options)
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(
                module.weight, nonlinearity="relu", generator=generator
            )
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


def _network(
    name: str, classes: int, channels: int, options: dict[str, float]
) -> nn.Sequential:
    match name:
        case "vgg11":
            return vgg11(classes, channels, **options)
        case "vgg11-narrow":  # an eighth of the channels
            return vgg11(classes, channels, **{"width": 0.125, **options})
        case "vgg5":  # three convolutions, no dropout
            layout = (16, "M", 32, "M", 32, "M")
            return vgg(layout, (32,), classes, channels, **{"dropout": 0.0, **options})
        case "resnet56":
            return resnet56(classes, channels)
        case "resnet20":
            return resnet(20, (16, 32, 64), classes, channels)
        case _:
            return resnet8(classes, channels)


def _scaled(units: int | str, width: float) -> int:
    return max(1, round(int(units) * width))
