"""Graphs that cannot be read, refused by what is in them."""

from __future__ import annotations

from ..errors import CaptureError
from ..graph.compiled import NODE as COMPILED
from ..graph.nodes import COLLECTIVES
from ..graph.tape import Tape
from .plan import Plan

__all__ = [
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
            "checkpoint or a compiled one. Do that inside the region, or use "
            "use_reentrant=False or the uncompiled module."
        )


def refuse_complex(tape: Tape) -> None:
    """Raise for complex numbers."""
    for i, node in enumerate(tape.nodes):
        if any(meta.dtype.is_complex for meta in node._input_metadata):
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
