"""What is trained in the benchmarks: W1, W1L, W2, W3, W4, W5, W6.

Random inputs and targets, cross-entropy, PyTorch's default initialisation, fixed seeds;
but W6 starts as GPT-2 does and predicts the next of tokens that recur as in a text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import models

__all__ = ["WORKLOADS", "Workload", "build", "freeze_norms", "train"]

NORM_LAYERS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Workload:
    """A network with one batch of data and a loss for each sample of it."""

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    note: str = ""

    @property
    def batch_size(self) -> int:
        return len(self.inputs)

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.inputs, self.targets

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that require a gradient, by name."""
        named = self.model.named_parameters()
        return {name: p for name, p in named if p.requires_grad}

    def losses(self) -> Tensor:
        """`[batch]`: the loss of each sample."""
        return sample_losses(self.model(self.inputs), self.targets)

    def fresh(self) -> Workload:
        """The same model in a new object; the data is shared.

        Libraries leave hooks and attributes on a model, so each gets its own, built
        anew: only the numbers are carried over.
        """
        model = WORKLOADS[self.name].make_model()
        model.load_state_dict(self.model.state_dict())
        mine = dict(self.model.named_parameters())
        for name, p in model.named_parameters():
            p.requires_grad_(mine[name].requires_grad)
        return replace(self, model=model)

    def double(self) -> Workload:
        """`fresh`, in float64."""
        copy = self.fresh()
        copy.model.double()
        inputs = self.inputs
        inputs = inputs.double() if inputs.is_floating_point() else inputs
        return replace(copy, inputs=inputs)


def sample_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each sample; for sequences the mean over its tokens."""
    if outputs.ndim == 2:
        return F.cross_entropy(outputs, targets, reduction="none")
    tokens = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
    return tokens.view(targets.shape).mean(dim=1)


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean of `sample_losses`; samples of a batch are equally long."""
    if outputs.ndim == 3:
        outputs, targets = outputs.flatten(0, 1), targets.flatten()
    return F.cross_entropy(outputs, targets)


def _classes(batch: int, *shape: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(batch, *shape), torch.randint(10, (batch,)))


def _tokens(batch: int, time: int, vocabulary: int):
    return lambda: (
        torch.randint(vocabulary, (batch, time)),
        torch.randint(vocabulary, (batch, time)),
    )


def _text(batch: int, time: int, vocabulary: int):
    """Tokens as frequent as words are (Zipf's law), targets that are the next ones.

    So tokens recur, and a table that is tied to the head meets its own rows there.
    """

    def make():
        chances = 1 / torch.arange(1, vocabulary + 1)
        ids = chances.multinomial(batch * (time + 1), replacement=True)
        ids = ids.view(batch, time + 1)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    return make


@dataclass(frozen=True)
class Recipe:
    """How to make a workload. The seed is that of the model, and plus one of the data.

    W3's is the first with which no ReLU or pooling of the plain step decides another
    way in float64 than in float32: the gradient is discontinuous there, and with seed
    0 one such decision moves it by 1.3 %, which would be nobody's error.
    """

    make_model: Callable[[], nn.Module]
    make_data: Callable[[], tuple[Tensor, Tensor]]
    seed: int = 0


WORKLOADS: dict[str, Recipe] = {
    "W1": Recipe(models.mlp, _classes(128, 784)),
    "W1L": Recipe(models.mlp, _classes(512, 784)),
    "W2": Recipe(models.small_convnet, _classes(64, 3, 32, 32)),
    "W3": Recipe(models.vgg11, _classes(64, 3, 32, 32), seed=1),
    "W4": Recipe(models.ResNet20, _classes(64, 3, 32, 32)),
    "W5": Recipe(models.Decoder, _tokens(16, 128, 2048)),
    "W6": Recipe(models.GPT2, _text(4, 64, 50257)),
}


def build(name: str) -> Workload:
    """The workload of that name; the same numbers at every call.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in WORKLOADS:
        known = ", ".join(WORKLOADS)
        raise ValueError(f"Unknown workload {name!r}. Choose one of {known}.")
    recipe = WORKLOADS[name]
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = recipe.make_model()
        torch.manual_seed(recipe.seed + 1)
        inputs, targets = recipe.make_data()
    return Workload(name, model, inputs, targets)


def freeze_norms(workload: Workload) -> Workload:
    """Turns off the norm layers' parameters, for libraries that skip those layers."""
    for module in workload.model.modules():
        if isinstance(module, NORM_LAYERS):
            module.requires_grad_(False)
    return replace(workload, note="norm parameters off")


def train(workload: Workload, steps: int, lr: float) -> Workload:
    """Moves the model by `steps` steps of plain gradient descent on its batch."""
    for _ in range(steps):
        workload.model.zero_grad(set_to_none=True)
        workload.losses().mean().backward()
        with torch.no_grad():
            for p in workload.parameters.values():
                p -= lr * p.grad
    workload.model.zero_grad(set_to_none=True)
    return replace(workload, note=f"after {steps} steps of size {lr}")
