"""`fastminima doctor`: what would be slow or refused in a model, before a run."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict

from torch import Tensor

from ..capture.options import BatchNorm
from . import loss_checks, model_checks
from .attention_checks import of_attention
from .compile_checks import of_compiled, opaque_regions
from .findings import ORDER, Finding
from .graph_checks import nodes_of, of_graph, of_structure
from .target import Target, load_target

__all__ = ["examine", "run"]

_WIDTH = 84


def run(options: argparse.Namespace) -> int:
    """Print what was found, the worst first; 1 where something would be refused."""
    target = load_target(options.target)
    with contextlib.redirect_stdout(sys.stderr):  # what a loss prints is no result
        found = examine(target, options.batchnorm)
    is_ok = all(finding.verdict != "refused" for finding in found)
    if options.json:
        listed = [asdict(finding) for finding in found]
        print(json.dumps({"ok": is_ok, "findings": listed}, indent=1))
        return 0 if is_ok else 1
    for finding in found:
        print(_text(finding))
    counts = {
        verdict: sum(finding.verdict == verdict for finding in found)
        for verdict in ("refused", "slow")
    }
    print(f"\n{counts['refused']} refused, {counts['slow']} slow")
    return 0 if is_ok else 1


def examine(target: Target, batchnorm: BatchNorm = "error") -> list[Finding]:
    """Everything that can be said before a run, the worst first.

    The loss is evaluated a few times, as in training; no step is taken, and `.grad`
    stays as it is.

    Args:
        target: model, loss and batch.
        batchnorm: what the probe will do about batch normalisation.
    """
    model = target.model
    modules = list(model_checks.of_modules(model, batchnorm))
    found = [*model_checks.of_machine(model), *model_checks.of_parameters(model)]
    found += modules
    losses = target.losses()
    found += loss_checks.of_loss(losses, target.batch_size)
    if losses.requires_grad:
        # What the modules told already the probe would say once more.
        is_told = any(finding.verdict == "refused" for finding in modules)
        found += _of_graph(target, losses, batchnorm, is_told=is_told)
        found += loss_checks.of_product(target)
    return sorted(found, key=lambda finding: ORDER.index(finding.verdict))


def _of_graph(
    target: Target, losses: Tensor, batchnorm: BatchNorm, *, is_told: bool
) -> Iterator[Finding]:
    """What the graph and a probe that reads it tell."""
    model, size, nodes = target.model, target.batch_size, nodes_of(losses)
    yield from of_graph(nodes)
    yield from of_attention(model, nodes)
    can_read = losses.dim() == 1 or (losses.dim() == 0 and size is not None)
    reading = None
    if can_read and not is_told:
        reading = loss_checks.read(model, losses, batchnorm, size or 0)
    is_read = reading is not None and reading.error is None
    told = () if reading is None else reading.told
    yield from of_compiled(model, nodes, told, is_read=is_read)
    if reading is not None and not opaque_regions(nodes):
        yield from loss_checks.of_reading(reading)
    yield from of_structure(target, losses)


def _text(finding: Finding) -> str:
    lines = [f"{finding.verdict:<8} {finding.subject}: {finding.what}"]
    for part, mark in ((finding.why, ""), (finding.remedy, "-> ")):
        indent = " " * 9 + mark
        below = " " * len(indent)
        lines += textwrap.wrap(
            part, _WIDTH, initial_indent=indent, subsequent_indent=below
        )
    return "\n".join(lines)
