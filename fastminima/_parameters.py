"""Which parameters of a model are tracked, and under which names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

__all__ = ["check_parameter", "tracked_parameters"]


def tracked_parameters(
    model: nn.Module | Mapping[str, nn.Parameter],
) -> dict[str, nn.Parameter]:
    """Parameters that require grad by name, in the order of `named_parameters()`.

    A tied parameter appears once, under its first name.

    Raises:
        ValueError: when there is none, or one is complex or not initialised yet.
        TypeError: when `model` is neither a module nor a mapping.
    """
    if isinstance(model, nn.Module):
        named = dict(model.named_parameters())
    elif isinstance(model, Mapping):
        named = dict(model)
    else:
        raise TypeError(
            f"Expected an nn.Module or a dict name -> parameter, got "
            f"{type(model).__name__}."
        )
    tracked: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, parameter in named.items():
        if parameter.requires_grad and id(parameter) not in seen:
            check_parameter(name, parameter, "statistics are")
            _check_leaf(name, parameter)
            seen.add(id(parameter))
            tracked[name] = parameter
    if not tracked:
        raise ValueError(
            f"No trainable parameters: none of the {len(named)} parameters requires "
            "grad. Call requires_grad_() on those to track."
        )
    return tracked


def check_parameter(name: str, parameter: nn.Parameter, what: str) -> None:
    """ValueError for one not initialised, or complex; `what` as in "curvature is"."""
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(
            f"Parameter {name!r} is not initialised yet. Run the model once on a batch."
        )
    if parameter.is_complex():
        raise ValueError(
            f"Parameter {name!r} is {parameter.dtype}; {what} defined here for "
            "real parameters. Store it as view_as_real, or freeze it."
        )


def _check_leaf(name: str, parameter: nn.Parameter) -> None:
    if not parameter.is_leaf:
        raise ValueError(
            f"{name!r} is not a leaf: it was computed from other tensors. Pass the "
            "parameters that it was computed from."
        )
