"""What backends call the things that a batch normalisation saves for its backward.

A layer is another node on each backend: PyTorch's own kernels, cuDNN, MIOpen, and the
operators that graphs are traced into. They save the same things under other names.

Source: `torchgen/packaged/autograd/derivatives.yaml` of the installed PyTorch, which
`tests/capture/test_saved_names.py` compares with this.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .node import Node
from .saved import saved_tensor

__all__ = [
    "BATCH_NORMS",
    "CALLED_ONLY",
    "BatchNormNames",
    "batch_statistics",
    "is_training",
]


@dataclass(frozen=True)
class BatchNormNames:
    """Attributes of a node, without `_saved_`, by what they are.

    `training` is a word where the node says in which mode it ran, else the mode.
    """

    eps: str = "eps"
    training: str | bool = "training"
    input: str = "input"
    weight: str = "weight"
    mean: str = "result1"  # of the batch, in training mode
    rstd: str = "result2"  # 1 / sqrt(variance + eps) of the batch, in training mode
    running_mean: str | None = "running_mean"  # in evaluation mode, as the next
    running_var: str | None = "running_var"


BATCH_NORMS: dict[str, BatchNormNames] = {
    "NativeBatchNormBackward0": BatchNormNames(),
    "CudnnBatchNormBackward0": BatchNormNames(eps="epsilon"),
    "MiopenBatchNormBackward0": BatchNormNames(eps="epsilon"),
    "NativeBatchNormLegitBackward0": BatchNormNames(),
    "NativeBatchNormLegitBackward1": BatchNormNames(
        running_mean=None, running_var=None
    ),
    "NativeBatchNormLegitNoTrainingBackward0": BatchNormNames(training=False),
    "BatchNormWithUpdateBackward0": BatchNormNames(training=True),
    "BatchNormNoUpdateBackward0": BatchNormNames(training=False),
}

# Fused layers of which nothing is read: the universal rule calls the node, which knows
# its random numbers and workspaces itself, on every backend.
CALLED_ONLY = frozenset(
    f"{name}Backward0"
    for name in (
        *("ScaledDotProductFlashAttention", "ScaledDotProductEfficientAttention"),
        *("ScaledDotProductCudnnAttention", "ScaledDotProductFlashAttentionForCpu"),
        *("ScaledDotProductFusedAttentionOverrideable", "CudnnRnn", "MiopenRnn"),
        *("MkldnnRnnLayer", "LstmMps", "ThnnFusedLstmCell", "ThnnFusedGruCell"),
    )
)


def is_training(node: Node) -> bool:
    """Whether a batch normalisation took its statistics over the batch."""
    training = BATCH_NORMS[node.name()].training
    if isinstance(training, bool):
        return training
    return getattr(node, f"_saved_{training}")


def batch_statistics(node: Node) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each channel, as the node applied them."""
    names = BATCH_NORMS[node.name()]

    def saved(word: str) -> Tensor:
        return saved_tensor(node, f"_saved_{word}")

    running_var = names.running_var and saved(names.running_var)
    if is_training(node) or names.running_mean is None or running_var is None:
        return saved(names.mean), saved(names.rstd)
    eps = getattr(node, f"_saved_{names.eps}")
    return saved(names.running_mean), (running_var + eps).rsqrt()
