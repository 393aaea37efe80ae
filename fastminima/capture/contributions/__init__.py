"""Per-sample gradients of one parameter, in the form its layer gives them.

A contribution stands for the tensor `[batch, *shape]` of sample gradients without
holding it. All results are in the accumulation dtype and for gradients as autograd
delivers them; who collects them scales them.
"""

from .base import Contribution, Materialized, sq_norms_of
from .conv import Convolution, ConvolutionBias, Frames, Patches
from .dense import Column, Dense, DenseBias, Products, Stacked
from .embedding import Embedding
from .joined import Apart, Joined, joined
from .moved import Placed, Pushed, reshaped
from .pieces import InPieces, in_pieces

__all__ = [
    "Apart",
    "Column",
    "Contribution",
    "Convolution",
    "ConvolutionBias",
    "Dense",
    "DenseBias",
    "Embedding",
    "Frames",
    "InPieces",
    "Joined",
    "Materialized",
    "Patches",
    "Placed",
    "Products",
    "Pushed",
    "Stacked",
    "in_pieces",
    "joined",
    "reshaped",
    "sq_norms_of",
]
