"""The spectra of an operator's diagonal blocks, layer by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..curvature import DerivedOperator
from .eigenpairs import Criterion, Which, top_eigenpairs
from .results import Eigenpairs

__all__ = ["block_eigenpairs"]


def block_eigenpairs(
    H: Any,
    k: int = 1,
    by: str | Mapping[str, Sequence[str]] = "layer",
    which: Which = "largest",
    rtol: float = 1e-2,
    max_products: int = 200,
    seed: int = 0,
    *,
    miss: float = 0.002,
    criterion: Criterion = "residual",
    basis_dtype: torch.dtype | None = None,
) -> dict[str, Eigenpairs]:
    """The eigenpairs of each layer's diagonal block at one end of its spectrum.

    One recorded graph serves all layers, and one gradient is where all runs start. A
    product with a block goes through the part of the graph that is made of its layer,
    and leaves out the gradients of the other layers: that of all blocks of n like
    layers costs about n/6 passes through the whole graph, not n. A vector of all layers
    at once would give their products with what couples the layers added. Of several
    batches each product records anew, which costs more than the product.

    Args:
        H: An operator, or what is made of operators: all that has `.blocks()`.
        k: How many of each block; all of a block that has fewer parameters.
        by: What a block is, as in `H.blocks`: "layer", "parameter", or groups of names
            of parameters or modules.
        which: As the following for `top_eigenpairs`.
        rtol: Tolerance.
        max_products: Where to give up, in each block.
        seed: Of the random vectors.
        miss: The probability to miss one, in each block.
        criterion: What `rtol` is about.
        basis_dtype: What bases are kept in.

    Returns:
        By the block's name, as of `top_eigenpairs`: `vectors` are over the parameters
        of the block, `products` those within it. The first has those by which a fresh
        operator compares itself.

    Raises:
        ValueError: As `top_eigenpairs` and `H.blocks`.

    Warns:
        ConvergenceWarning: As `top_eigenpairs`.

    Example:
        >>> import torch
        >>> import fastminima as fm
        >>> first, last = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1)
        >>> model = torch.nn.Sequential(first, last).double()
        >>> _ = [torch.nn.init.constant_(p, 2.0) for p in model.parameters()]
        >>> x = torch.ones(4, 1).double()
        >>> H = fm.Hessian(model, lambda m, x: m(x).square().mean() / 2, x)
        >>> pairs = fm.block_eigenpairs(H)
        >>> {name: round(float(p.values[0]), 6) for name, p in pairs.items()}
        {'0': 4.0, '1': 5.0}
    """
    below = H.operators if isinstance(H, DerivedOperator) else [H]
    found = {}
    with contextlib.ExitStack() as stack:
        for operator in below:
            stack.enter_context(operator.held())
        gradient = H.gradient.detach()
        for name, block in H.blocks(by).items():
            found[name] = top_eigenpairs(
                block.starting_from(gradient),
                min(k, block.shape[0]),
                which,
                rtol=rtol,
                max_products=max_products,
                seed=seed,
                miss=miss,
                criterion=criterion,
                basis_dtype=basis_dtype,
            )
    return found
