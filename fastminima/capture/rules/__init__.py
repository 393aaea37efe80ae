"""How each kind of node gives the per-sample gradients of the parameters it uses.

A file a family, and one row a node. A rule is called in the node's prehook, when its
saved tensors and output gradients are at hand. It returns one contribution for each
slot it knows; slots it leaves out go to the universal rule, which knows every node.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..graph.node import Node
from ..graph.saved_names import BATCH_NORMS
from ..reading.plan import Slot
from ..rows.layout import RowLayout
from . import conv, dense, elementwise, embedding, norm, routed
from .base import Contributions, Rule

__all__ = ["RULES", "contributions_of"]

RULES: dict[str, Rule] = {
    "AddBackward0": elementwise.add,
    "AddmmBackward0": dense.addmm,
    "BaddbmmBackward0": dense.baddbmm,
    "BmmBackward0": dense.bmm,
    "ConvolutionBackward0": conv.convolution,
    "DivBackward0": elementwise.div,
    "EmbeddingBackward0": embedding.embedding,
    "EmbeddingBagBackward0": embedding.embedding_bag,
    "ExpandBackward0": elementwise.repeat,
    "FusedRmsNormBackward0": norm.rms_norm,
    "GroupedMmBackward0": routed.grouped_mm,
    "IndexBackward0": embedding.index,
    "IndexPutBackward0": routed.index_put,
    "IndexPutImplBackward0": routed.index_put,
    "IndexSelectBackward0": embedding.index_select,
    "LerpBackward0": elementwise.lerp,
    "MmBackward0": dense.mm,
    "MulBackward0": elementwise.multiply,
    "MvBackward0": dense.mv,
    "NativeGroupNormBackward0": norm.group_norm,
    "NativeLayerNormBackward0": norm.layer_norm,
    "PreluKernelBackward0": elementwise.prelu,
    "RepeatBackward0": elementwise.repeat,
    "SubBackward0": elementwise.sub,
    "TrilinearBackward0": dense.trilinear,
    "WhereBackward0": elementwise.where,
    **dict.fromkeys(BATCH_NORMS, norm.batch_norm),
}


def contributions_of(
    name: str,
    node: Node,
    grads: Sequence[Tensor | None],
    layouts: Sequence[RowLayout | None],
    slots: Sequence[Slot],
) -> Contributions:
    """Contributions for the slots that a rule covers; none when there is no rule."""
    rule = RULES.get(name)
    if rule is None or grads[0] is None or layouts[0] is None:
        return {}
    return rule(node, grads[0], layouts[0], slots)
