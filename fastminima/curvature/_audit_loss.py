"""Audits a loss whose graph is there once: what that graph tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .._flat import FlatLayout
from ._audit_closures import modes, precision
from ._audit_graph import ends, reach
from ._audit_lines import (
    asymmetry,
    not_finite,
    not_symmetric,
    random_columns,
    repeated,
)
from ._graph import Graph
from ._trust import Noise, difference
from .audit import CurvatureCheck

__all__ = ["look_at_loss"]

_PAIRS = 3


def look_at_loss(
    operator: Any,
    model: nn.Module,
    graph: Graph,
    layout: FlatLayout,
    names: Mapping[int, str],
    noise: Noise,
    seed: int,
) -> list[CurvatureCheck]:
    """The lines of an audit that one recorded graph has."""
    lines = [precision(noise), *modes(model), *ends(names, graph)]
    if not all(line.ok for line in lines):
        return lines
    lines.append(reach(layout, graph))
    columns = list(random_columns(operator, 2 * _PAIRS, seed))
    products = [operator @ column for column in columns]
    if not all(bool(torch.isfinite(product).all()) for product in products):
        return [*lines, not_finite()]
    apart = difference(products[0], operator @ columns[0])
    lines.append(repeated("product twice", "the same graph", apart, noise.repeat))
    suspicion, worst = asymmetry(columns, products, noise)
    looked_at = f"<u, A v> and <A u, v>, {_PAIRS} random pairs"
    numbers = worst, noise.symmetry
    if suspicion is None:
        lines.append(CurvatureCheck("symmetry", looked_at, "symmetric", *numbers))
    else:
        lines.append(not_symmetric(looked_at, *numbers))
    return [*lines, _not_evaluated()]


def _not_evaluated() -> CurvatureCheck:
    return CurvatureCheck(
        *("differences", "one recorded graph", "the loss is not evaluated again"),
        *(None, None, "untold"),
        "What is detached in the forward pass, reversed gradients and random numbers "
        "are seen by the audit of fm.Hessian(model, loss, batch) alone.",
    )
