"""Where in a model a node of the graph is, and what to say of mixed samples there."""

from __future__ import annotations

from torch import nn

from ..graph.tape import Tape
from ..rows.samples import Batch, Segments

__all__ = ["Whereabouts"]


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

    def mixed_message(self, tape: Tape, i: int, samples: Batch | Segments) -> str:
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
