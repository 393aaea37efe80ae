"""Graphs that cannot be read: by what is in them, or by what their rows do.

And where in a model that is, for the messages.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..errors import CaptureError
from ..graph.nodes import COLLECTIVES
from ..graph.replay import NODE as COMPILED
from ..graph.tape import Tape
from ..rows.samples import Samples, Segments
from .plan import Plan

__all__ = [
    "Whereabouts",
    "refuse_collectives",
    "refuse_compiled",
    "refuse_complex",
    "refuse_hidden",
    "refuse_nested",
]


def refuse_collectives(tape: Tape) -> None:
    """Raise for a loss that other ranks had a part in."""
    for name in tape.names:
        if name in COLLECTIVES or "c10d_functional" in name:
            raise CaptureError(
                f"The loss of this rank was computed from other ranks' samples or "
                f"parameters ({name}), so it has no samples of its own, and a pass of "
                "one rank would wait for the others. Probe a loss without collectives "
                "in its graph; SyncBatchNorm goes by model.eval()."
            )


def refuse_compiled(tape: Tape, regions: list[int]) -> None:
    """Raise for a compiled node that is none of the `regions` that can run again."""
    for i, name in enumerate(tape.names):
        if name.startswith(COMPILED) and i not in regions:
            raise CaptureError(
                "The loss was computed by a region compiled with torch.compile, which "
                "is one opaque node here. Compile with fastminima.compile(model), or "
                "probe the uncompiled module (for a compiled `fast = "
                "torch.compile(model)`, run `model` itself) on the steps that you "
                "probe."
            )


def refuse_hidden(plan: Plan) -> None:
    """Raise for a parameter that a region is given in another form."""
    for name in plan.hidden:
        raise CaptureError(
            f"Parameter {name!r} is changed (cast, reshaped, normalised) before it "
            "enters a region that runs again in the backward pass, a reentrant "
            "checkpoint or a compiled one, or samples are mixed between the two (by "
            "the losses?). Change it inside the region, or use use_reentrant=False or "
            "the uncompiled module."
        )


def refuse_complex(tape: Tape, nodes: Iterable[int] | None = None) -> None:
    """Raise for complex numbers, in some nodes or in all."""
    for i in range(len(tape.nodes)) if nodes is None else nodes:
        if any(meta.dtype.is_complex for meta in tape.nodes[i]._input_metadata):
            raise CaptureError(
                f"The loss computes with complex numbers ({tape.names[i]}), which are "
                "not supported; write that part with real ones, as in a matrix product "
                "with cosines and sines."
            )


def refuse_nested(tape: Tape) -> None:
    """Raise for nested tensors."""
    for i, node in enumerate(tape.nodes):
        if any(meta.is_nested_tensor for meta in node._input_metadata):
            raise CaptureError(
                f"The loss computes with nested tensors ({tape.names[i]}), which are "
                "not supported; run the model on padded ones."
            )


class Whereabouts:
    """The modules that own a model's parameters, for messages.

    Args:
        model: None where only parameters are known.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._modules = {} if model is None else _owners(model)

    def module_at(self, tape: Tape, i: int) -> str:
        """The module whose parameter node `i` uses, or what is known instead."""
        for edge in tape.children[i]:
            if edge is not None and edge[0] in tape.parameter_at:
                parameter = tape.parameter_at[edge[0]]
                return self._modules.get(parameter, parameter)
        names = (tape.parameter_at.get(j) for j in tape.below(i))
        below = next(filter(None, names), None)
        return f"{tape.names[i]}" + (f" above {below!r}" if below else "")

    def mixing_message(self, tape: Tape, mixing: list[int]) -> str:
        """Of batch normalisations in training mode."""
        names = [self.module_at(tape, i) for i in mixing]
        shown = ", ".join(dict.fromkeys(names[:4])) + (
            ", ..." if len(names) > 4 else ""
        )
        return (
            f"Batch normalisation in training mode mixes the samples of a batch "
            f"({len(mixing)} layers: {shown}), so the loss defines no gradient of one "
            'sample. Choose batchnorm="rows" (each sample\'s rows of the ordinary '
            'backward pass) or batchnorm="frozen" (batch statistics as constants), '
            "call model.eval(), or use MinibatchVariance."
        )

    def mixed_message(self, tape: Tape, i: int, samples: Samples) -> str:
        """Of rows that met several samples."""
        where = self.module_at(tape, i)
        packed = ""
        if isinstance(samples, Segments):
            packed = (
                "Attention must keep segments apart, and tokens that are -1 in "
                "segment_ids must have no part in the loss; layers that have time in "
                "their last dim (convolutions) are not read with segments. "
            )
        return (
            f"The rows of {tape.names[i]} at {where} (shape {tape.shapes(i)[0]}) do "
            f"not each belong to one of the {samples.count} samples: a layer after it "
            "mixes samples, or the losses do. Leave the mixing layer out, or use "
            f"MinibatchVariance. {packed}(In float16, gradients so small that they "
            "round do not scale either: multiply the loss and pass scale=.)"
        )


def _owners(model: nn.Module) -> dict[str, str]:
    """Name of the module that owns each parameter, for messages."""
    owners = {}
    for module_name, module in model.named_modules():
        for key, _ in module.named_parameters(recurse=False):
            full = f"{module_name}.{key}" if module_name else key
            owners[full] = f"{module_name or 'the model'} ({type(module).__name__})"
    return owners
