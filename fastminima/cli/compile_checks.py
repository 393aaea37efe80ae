"""What a probe makes of compiled regions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..capture.graph.replay import NODE, replay_of
from .findings import Finding, some

__all__ = ["RUNS_AGAIN", "of_compiled", "opaque_regions"]

RUNS_AGAIN = "A compiled region runs once more"  # how the probe's warning begins


def opaque_regions(nodes: Sequence[Any]) -> list[Any]:
    """Nodes of compiled regions into which a probe cannot look."""
    return [n for n in _regions(nodes) if replay_of(n) is None]


def _regions(nodes: Sequence[Any]) -> list[Any]:
    return [node for node in nodes if node.name().startswith(NODE)]


def of_compiled(
    model: nn.Module, nodes: Sequence[Any], told: Sequence[str], *, is_read: bool
) -> Iterator[Finding]:
    """Regions that are opaque, that run again, and that show the uses inside.

    Args:
        model: some of whose modules may be compiled.
        nodes: of the loss's graph.
        told: warnings of the probe that read it.
        is_read: whether one has.
    """
    regions, opaque = _regions(nodes), opaque_regions(nodes)
    compiled = [name for name, module in model.named_modules() if _is_compiled(module)]
    named = f" ({some([name or 'the model' for name in compiled])})" if compiled else ""
    again = [text for text in told if text.startswith(RUNS_AGAIN)]
    if opaque:
        yield Finding(
            "refused",
            "torch.compile",
            f"{_count(opaque)}{named} cannot be looked into",
            "A compiled region is one node of the graph, whose parts and rows a probe "
            "does not see, with or without parameters in it. Curvature runs it "
            "uncompiled.",
            "fm.compile(...) in place of torch.compile(...), of functions too, or the "
            "plain model on the steps that are probed.",
        )
    elif again:
        yield Finding(
            "slow",
            "torch.compile",
            f"run once more, uncompiled: {_count(again)}{named}",
            again[0],
            'fm.compile with backend="inductor" or "aot_eager"; no dropout and no '
            "buffer that changes in such a region.",
        )
    elif regions and is_read:
        yield Finding(
            "ok",
            "torch.compile",
            f"{_count(regions)}{named} read inside compiled code",
            "Steps that are probed and steps that are not run the same code.",
        )
    elif compiled and not regions:
        yield Finding(
            "note",
            "torch.compile",
            f"no region{named} in the graph: what is compiled ran uncompiled",
            "It is switched off, or left out by the compiler; the probe reads it as "
            "any other module.",
            "TORCH_LOGS=graph_breaks says why.",
        )


def _is_compiled(module: nn.Module) -> bool:
    if type(module).__name__ == "OptimizedModule":
        return True
    return getattr(module, "_compiled_call_impl", None) is not None


def _count(regions: Sequence[Any]) -> str:
    return "1 region" if len(regions) == 1 else f"{len(regions)} regions"
