"""What an optimizer keeps of earlier steps: what it divides by, what it averages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._flat import FlatLayout
from ._shards import whole

__all__ = ["divisors", "momenta", "preconditioner"]

Optimizer = torch.optim.Optimizer
Of = Callable[[Any, Mapping[str, Any], Mapping[str, Any]], Tensor]

_MOMENTA = ("exp_avg", "momentum_buffer")  # as PyTorch's optimizers name them


def preconditioner(model: nn.Module, optimizer: Optimizer) -> Float[Tensor, " params"]:
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
    layout = FlatLayout(model)
    parameters = dict(zip(layout.names, layout.parameters, strict=True))
    return layout.join(list(divisors(optimizer, parameters).values()))


def divisors(
    optimizer: Optimizer, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The same for some parameters, each shaped as it is.

    Raises:
        ValueError: as `preconditioner`.
    """
    return _of_states(optimizer, parameters, _divisor)


def momenta(
    optimizer: Optimizer, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The running averages of gradients that an optimizer keeps of some parameters.

    Its state `exp_avg`, as of Lion and Adam, or `momentum_buffer`, as of SGD: as it is
    there, in the unit of gradients times what their weights add up to.

    Raises:
        ValueError: for an optimizer that keeps neither, and for parameters that it has
            not stepped.
    """
    return _of_states(optimizer, parameters, _momentum)


def _of_states(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], of: Of
) -> dict[str, Tensor]:
    """A tensor of each parameter's state."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    parts = {}
    for name, p in parameters.items():
        state: Mapping[str, Any] = optimizer.state.get(p, {})
        if id(p) not in groups or not state:
            raise ValueError(
                f"The optimizer has no state for {name!r}. Take a step with it first, "
                "or freeze parameters that it does not train."
            )
        parts[name] = whole(of(optimizer, groups[id(p)], state))
    return parts


def _divisor(
    optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Tensor:
    eps = group.get("eps", 0.0)
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        first, second = group["betas"]
        steps = state["step"]
        # Of fused and capturable ones it lies on the device: not waited for.
        is_there = isinstance(steps, Tensor) and steps.device.type != "cpu"
        steps = steps.double() if is_there else float(steps)
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
    optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Tensor:
    found = next((state[n] for n in _MOMENTA if state.get(n) is not None), None)
    if found is None:
        raise ValueError(
            f"{type(optimizer).__name__} keeps no momentum whose signs could be read: "
            f"its state has {sorted(state) or 'nothing'}, not one of "
            f"{', '.join(_MOMENTA)}. Train with momentum, or leave precondition= out."
        )
    return found
