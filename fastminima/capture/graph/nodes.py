"""Autograd's nodes by name: what each does to the rows and dims that pass it.

The one place that knows them. A node that is in none of these tables is not an error:
its rows are measured like all others, and its parameters go to the universal rule.
What a missing entry costs is said of each table; in `BY_DIM`, `BY_INDICES`,
`MOVE_UNSEEN` and `PLACING` it is more than time: there a remembered layout could
outlive what moved its rows, and only the standing check (`check_every`) would notice.

A new view or elementwise op of PyTorch: `REARRANGING` or `ELEMENTWISE`, and if numbers
of its own say where rows go, `PLACING`. `tests/capture/test_nodes.py` compares every
name and attribute with those of the installed PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass

from .node import Node

__all__ = [
    "ACCUMULATE",
    "ADDMM",
    "ALONG",
    "ASSIGNMENT",
    "BAG",
    "BROADCASTING",
    "BY_DIM",
    "BY_INDICES",
    "COLLECTIVES",
    "CONVOLUTION",
    "ELEMENTWISE",
    "EMBEDDING",
    "EVEN",
    "FACTORS",
    "JOINING",
    "KEEPING_ORDER",
    "MAY_MIX",
    "MOVE_UNSEEN",
    "NORMALISING_LAST",
    "PICKS",
    "PLACING",
    "PRODUCTS",
    "READ_UNSEEN",
    "REARRANGING",
    "REDUCING",
    "REORDERING",
    "ROUNDING",
    "SHOWING_INPUT",
    "SHOWN_SHAPE",
    "TRANSPOSING",
    "VIEWS",
    "Pick",
    "Product",
    "is_scaled",
]

ACCUMULATE = "torch::autograd::AccumulateGrad"
ASSIGNMENT = "torch::autograd::CopySlices"  # in place, to a part of a tensor
BAG = "EmbeddingBagBackward0"
CONVOLUTION = "ConvolutionBackward0"
EMBEDDING = "EmbeddingBackward0"
ROUNDING = "ToCopyBackward0"  # to another dtype or device
ADDMM = "AddmmBackward0"


def _nodes(words: str, versions: tuple[int, ...] = (0,)) -> frozenset[str]:
    """`<word>Backward<version>`: overloads of one function are numbered."""
    return frozenset(f"{word}Backward{i}" for word in words.split() for i in versions)


# ---- Elements stay what they are ----
# `t_`, `transpose_` and the like have nodes of their own.
_TURNED_IN_PLACE = _nodes("T Transpose", versions=(1,))
_SQUEEZES = _nodes("Squeeze", versions=(0, 1, 2, 3, 4, 5))
# Every element of the gradient goes to one place. Missing: a parameter that is taken
# through the node reaches its use by the universal rule.
REARRANGING = (
    _nodes(
        "T View UnsafeView ReshapeAlias Transpose Permute ToCopy Clone "
        "Slice Select Split SplitWithSizes UnsafeSplit Unbind Unsqueeze "
        "Alias"
    )
    | _TURNED_IN_PLACE
    | _SQUEEZES
    | {"UnsqueezeBackward1"}
)
# ... and all of them, in the same order. [B, T, d] -> [B * T, d]
KEEPING_ORDER = {"UnsqueezeBackward1"} | _nodes(
    "View UnsafeView ReshapeAlias Unsqueeze Squeeze Alias ToCopy Clone"
)
# ... in another shape: the first dim is what it was if its size is. Missing: rows that
# two layouts fit are measured again in each step.
VIEWS = _nodes("View UnsafeView ReshapeAlias", versions=(0, 1))
# ... which keep the shape of their input, as sizes: read in a fifth of the time of what
# the node below says of its outputs. Missing: that is read.
SHOWING_INPUT, SHOWN_SHAPE = VIEWS | _nodes("Expand"), "_saved_self_sym_sizes"
TRANSPOSING = _nodes("T Transpose") | _TURNED_IN_PLACE
# Dims are moved past each other; sizes say where rows go: [4, B, 6] is not [6, B, 4].
REORDERING = TRANSPOSING | {"PermuteBackward0"}

# ---- Each output is made of the inputs at its place ----
# Missing: rows that experts route are measured in each step.
ELEMENTWISE = _nodes(
    "Add Sub Rsub Mul Div Where MaskedFill Pow Neg Abs Exp Log Sqrt "
    "Rsqrt Reciprocal Sin Cos Clamp ClampMin ClampMax Relu LeakyRelu "
    "Elu Gelu Silu Mish Sigmoid LogSigmoid Tanh Softplus Hardtanh "
    "Hardswish Threshold NativeDropout ToCopy Clone Alias",
    versions=(0, 1),
)
# An operand is spread along the dims where it has size one. Missing: relative positions
# looked up with indices from outside are refused.
BROADCASTING = _nodes("Add Sub Mul Div Where MaskedFill Expand Repeat")
# Products of two operands, element by element: which attribute keeps each.
FACTORS: dict[str, tuple[str | None, ...]] = {
    "MulBackward0": ("self", "other"),
    "WeightNormInterfaceBackward0": ("v", "g"),
}

# ---- Along some dims, `_saved_dim` ----
# All other dims stay what they are. Missing: as of ELEMENTWISE.
ALONG = _nodes(
    "Split SplitWithSizes UnsafeSplit Slice Select Unbind Cat Stack "
    "Unsqueeze Squeeze Sum Mean Logsumexp Amax Cumsum Softmax "
    "LogSoftmax Gather Topk Sort IndexSelect Scatter ScatterAdd "
    "IndexAdd",
    versions=(0, 1),
) | {"SqueezeBackward2"}
# The dims are gone afterwards: what is left of a scalar loss' axis may be another one
# of that size. Missing: a scalar loss may be read along a wrong axis until the rows of
# the data say otherwise.
REDUCING = (
    _nodes("LinalgVectorNorm Logsumexp Amax Amin Max Min Var Std")
    | _nodes("Sum Mean Prod Norm", versions=(1,))
    | {"NormBackward3"}
)
EVEN = _nodes("Mean Sum")  # over everything: all samples weigh the same
JOINING = _nodes("Stack Cat")
# Over the last dims, `_saved_normalized_shape`.
NORMALISING_LAST = _nodes("NativeLayerNorm FusedRmsNorm")


# ---- Sums of products ----
@dataclass(frozen=True)
class Product:
    """A sum of products of two operands.

    Attributes:
        operands: the attribute that keeps what came in by each input (`_saved_...`).
        factors: the inputs that are multiplied, left and right; None where a plain
            matrix from outside the graph does not mix rows.
        rows: inputs whose first dim is that of the output.
        weight, bias: inputs by which a layer's parameters come in.
        is_of_vectors: whether the right factor has no rows to give to samples.
    """

    operands: tuple[str | None, ...] = ()
    factors: tuple[int, int] | None = None
    rows: tuple[int, ...] = ()
    weight: int | None = None
    bias: int | None = None
    is_of_vectors: bool = False

    @property
    def is_of_matrices(self) -> bool:
        """Whether it is a layer on the rows of a matrix."""
        return self.factors is not None and self.weight is not None


# Missing: a matrix from outside the graph may give rows to other samples unseen.
PRODUCTS = {
    ADDMM: Product((None, "mat1", "mat2"), (1, 2), rows=(1,), weight=2, bias=0),
    "MmBackward0": Product(("self", "mat2"), (0, 1), rows=(0,), weight=1),
    "BmmBackward0": Product(("self", "mat2"), (0, 1), rows=(0, 1)),
    "BaddbmmBackward0": Product((None, "batch1", "batch2"), (1, 2), rows=(0, 1, 2)),
    "AddbmmBackward0": Product(factors=(1, 2)),
    "MvBackward0": Product(("self", None), (0, 1), is_of_vectors=True),
    "AddmvBackward0": Product(factors=(1, 2), is_of_vectors=True),
    "SparseAddmmBackward0": Product(factors=(1, 2)),
    "SparseMmReduceImplBackward0": Product(factors=(0, 1)),
    "GroupedMmBackward0": Product(rows=(0,)),
    CONVOLUTION: Product(("input", "weight", None), weight=1, bias=2),
}


def is_scaled(node: Node, name: str) -> bool:
    """Whether a product is multiplied with a number, as by `torch.addmm(alpha=2)`."""
    return name == ADDMM and (node._saved_alpha != 1 or node._saved_beta != 1)


# ---- Rows picked by an index ----
@dataclass(frozen=True)
class Pick:
    """Rows taken out of a tensor, or put into one, by an index.

    Attributes:
        index: the attribute that keeps the index.
        moved: the input whose rows it moves.
    """

    index: str
    moved: int

    @property
    def takes(self) -> bool:
        """Whether it takes rows out of its first input; else it puts them in."""
        return self.moved == 0


PICKS = {
    "IndexBackward0": Pick("indices", 0),
    "IndexSelectBackward0": Pick("index", 0),
    "IndexPutBackward0": Pick("indices", 1),
    "IndexPutImplBackward0": Pick("indices", 1),
    "IndexAddBackward0": Pick("index", 1),
}
# By one index along `_saved_dim`: harmless unless that is the batch dim.
BY_DIM = _nodes(
    "IndexSelect Gather IndexAdd IndexCopy IndexFill Scatter ScatterAdd "
    "ScatterReduce Sort Topk",
    versions=(0, 1),
)
BY_INDICES = _nodes("Index IndexPut IndexPutImpl")
# By something that cannot be compared from step to step: layouts are not kept.
MOVE_UNSEEN = _nodes(
    "MaskedSelect MaskedScatter Take Put PackPaddedSequence SegmentReduce IndexReduce "
    "UnsafeIndex UnsafeIndexPut UnsafeMaskedIndex UnsafeMaskedIndexPutAccumulate"
)

# ---- Numbers that a program may change from step to step, and that move rows ----
# They are compared before a layout is used again.
PLACING: dict[str, tuple[str, ...]] = {
    "AsStridedBackward0": ("size", "stride", "storage_offset"),
    "AsStridedBackward1": ("size", "stride", "storage_offset"),
    "AsStridedScatterBackward0": ("size", "stride", "storage_offset"),
    "ChannelShuffleBackward0": ("groups",),
    "ConstantPadNdBackward0": ("pad",),
    "DiagEmbedBackward0": ("offset", "dim1", "dim2"),
    "DiagonalBackward0": ("offset", "dim1", "dim2"),
    "DiagonalScatterBackward0": ("offset", "dim1", "dim2"),
    "FlipBackward0": ("dims",),
    "PermuteBackward0": ("dims",),
    "RollBackward0": ("shifts", "dims"),
    "Rot90Backward0": ("k", "dims"),
    "SelectBackward0": ("dim", "index"),
    "SelectScatterBackward0": ("dim", "index"),
    "SliceBackward0": ("dim", "start", "end", "step"),
    "SliceScatterBackward0": ("dim", "start", "end", "step"),
    "SplitBackward0": ("split_size", "dim"),
    "SplitWithSizesBackward0": ("split_sizes", "dim"),
    "TransposeBackward0": ("dim0", "dim1"),
    "TransposeBackward1": ("dim0", "dim1"),
    "UnfoldBackward0": ("dimension", "size", "step"),
    "UnsafeSplitBackward0": ("split_size", "dim"),
    "UnsafeSplitWithSizesBackward0": ("split_sizes", "dim"),
    **dict.fromkeys(
        _nodes(
            "Amax Amin Aminmax Cat Cummax Cummin Cumprod Cumsum Gather Glu IndexAdd "
            "IndexCopy IndexFill IndexSelect Kthvalue LinalgVectorNorm LogSoftmax "
            "Logcumsumexp Logsumexp MaskedSoftmax Max Min Mode Nansum Renorm "
            "SafeSoftmax Scatter ScatterAdd ScatterReduce Softmax Sort Stack Std "
            "StdMean Topk Unbind Var VarMean"
        )
        | _nodes(
            "IndexFill Mean Median Nanmedian Norm Prod Scatter Sort Sum", versions=(1,)
        )
        | {"NormBackward3"},
        ("dim",),
    ),
    **dict.fromkeys(
        _nodes(
            "ReflectionPad1D ReflectionPad2D ReflectionPad3D "
            "ReplicationPad1D ReplicationPad2D ReplicationPad3D"
        ),
        ("padding",),
    ),
}

# ---- What the graph does not show ----
# Beginnings of names: they read an index, a mask or anything else besides their inputs.
READ_UNSEEN = (
    *("Embedding", "Index", "Gather", "Where", "Masked", "Take", "Scatter", "Nll"),
    *("Dropout", "NativeDropout", "CompiledFunction", "CheckpointFunction"),
    "torch::autograd",
)
# They can mix samples by themselves, in one mode or layout or another; with the batch
# normalisations of `saved_names.py`.
MAY_MIX = NORMALISING_LAST | {EMBEDDING, BAG, "NativeGroupNormBackward0"}
# Their backward sends tensors to other ranks: torch.distributed.nn.functional, the
# functional collectives, SyncBatchNorm.
COLLECTIVES = frozenset(
    f"{name}Backward"
    for name in (
        *("_Broadcast", "_Gather", "_Scatter", "_Reduce", "_Reduce_Scatter"),
        *("_AllGather", "_AllGatherBase", "_AlltoAll", "_AlltoAllSingle"),
        *("_AllReduce", "_FromTorchTensor", "_ToTorchTensor", "SyncBatchNorm"),
    )
)
