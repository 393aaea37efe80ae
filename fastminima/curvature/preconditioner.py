"""What an optimizer keeps of earlier steps: what it divides by, what it averages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._flat import FlatLayout
from ._shards import whole

__all__ = ["momentum", "preconditioner"]

_MOMENTA = ("exp_avg", "momentum_buffer")  # as PyTorch's optimizers name them


def preconditioner(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Float[Tensor, " params"]:
    """What an adaptive optimizer divides its steps by, for each parameter.

    For Adam and AdamW after t steps (1 - beta1^t) (sqrt(v / (1 - beta2^t)) + eps), v
    the running mean of squared gradients, or their largest under `amsgrad`: gradient
    descent with momentum beta1 and this preconditioner takes the same steps as long as
    it does not change. For RMSprop sqrt(v) + eps, for Adagrad sqrt(sum) + eps.

    Raises:
        ValueError: for another optimizer, and for parameters that it has not stepped.

    Source: Cohen et al. (2022), "Adaptive gradient methods at the edge of stability",
    arXiv:2207.14484; where the edge is says `theory.edge_of_stability`.
    """
    return _of_states(model, optimizer, _divisor)


def momentum(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Float[Tensor, " params"]:
    """The running average of gradients that an optimizer keeps.

    Its state `exp_avg`, as of Lion and Adam, or `momentum_buffer`, as of SGD: as it is
    there, in the unit of gradients times what their weights add up to.

    Raises:
        ValueError: for an optimizer that keeps neither, and for parameters that it has
            not stepped.
    """
    return _of_states(model, optimizer, _momentum)


def _of_states(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    of: Callable[[Any, Mapping[str, Any], Mapping[str, Any]], Tensor],
) -> Tensor:
    """A tensor of each parameter's state, in the flat order."""
    layout = FlatLayout(model)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    parts = []
    for name, p in zip(layout.names, layout.parameters, strict=True):
        state: Mapping[str, Any] = optimizer.state.get(p, {})
        if id(p) not in groups or not state:
            raise ValueError(
                f"The optimizer has no state for {name!r}. Take a step with it first, "
                "or freeze parameters that it does not train."
            )
        parts.append(whole(of(optimizer, groups[id(p)], state)))
    return layout.join(parts)


def _divisor(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Tensor:
    eps = group.get("eps", 0.0)
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        first, second = group["betas"]
        steps = float(state["step"])
        squares = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        root = (squares.double() / (1 - second**steps)).sqrt()
        return (1 - first**steps) * (root + eps)
    if isinstance(optimizer, torch.optim.RMSprop) and not group["centered"]:
        return state["square_avg"].double().sqrt() + eps
    if isinstance(optimizer, torch.optim.Adagrad):
        return state["sum"].double().sqrt() + eps
    raise ValueError(
        f"What {type(optimizer).__name__} divides by is not known here. Pass the "
        "diagonal as a vector: H.preconditioned(diagonal)."
    )


def _momentum(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Tensor:
    found = next((state[n] for n in _MOMENTA if state.get(n) is not None), None)
    if found is None:
        raise ValueError(
            f"{type(optimizer).__name__} keeps no momentum whose signs could be read: "
            f"its state has {sorted(state) or 'nothing'}, not one of "
            f"{', '.join(_MOMENTA)}. Train with momentum, or leave precondition= out."
        )
    return found
