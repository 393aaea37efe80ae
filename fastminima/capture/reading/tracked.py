"""What is known of the model: its tracked parameters, its parts, its own tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from ..errors import CaptureError
from ..graph.known import KnownGraphs
from ..graph.passes import replicas_at_rest
from ..graph.sharding import Sharding, is_sharded
from ..graph.tape import Tape
from ..graph.tracking import has_changed, untracked_leaves
from .refusals import Whereabouts

__all__ = ["TrackedModel"]


class TrackedModel:
    """The parameters that are tracked, and the module that has them, if there is one.

    Args:
        parameters: the tracked parameters by name.
        module: None where only parameters are known.
        sharding: of the parameters, if they are sharded.
        retrack: returns the parameters that are tracked from now on, where those of the
            module have changed.

    Attributes:
        names: of the tracked parameters, by id.
        where: says where in the module a node is.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        module: nn.Module | None,
        sharding: Sharding | None = None,
        retrack: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self._parameters, self._module = parameters, module
        self.sharding = sharding
        self._retrack = retrack
        self._graphs = KnownGraphs()
        self._is_whole: bool | None = None  # nothing but tracked parameters was met
        self.names = {id(p): name for name, p in parameters.items()}
        self.where = Whereabouts(module)

    def walk(self, root: Any) -> Tape:
        """The graph below a node, once all parameters in it are tracked.

        Raises:
            CaptureError: where a dict of parameters does not name all that it did.
        """
        tape = self._graphs.walk(root, self.names)
        if self.sharding is not None or self._retrack is None:
            return tape
        others = untracked_leaves(tape)
        if self._module is None:
            self._check_given(tape, others)
        elif has_changed(self._module, self._parameters, tape, others):
            self._parameters = self._retrack()
            self.names = {id(p): name for name, p in self._parameters.items()}
            self.where = Whereabouts(self._module)
            tape = Tape([root], self.names)
        return tape

    def wiring(self, tape: Tape) -> Any:
        """The wiring of the graph walked last, where a walk over it is all there is.

        None where it is not known yet, and where what it does not reach tells whether
        parameters have changed.
        """
        is_whole = len(tape.leaves) == len(self._parameters)
        if self.sharding is not None or not is_whole or untracked_leaves(tape):
            return None
        return self._graphs.wiring_of(tape)

    def _check_given(self, tape: Tape, others: Sequence[Tensor]) -> None:
        was_whole, self._is_whole = self._is_whole, not others
        frozen = [n for n, p in self._parameters.items() if not p.requires_grad]
        missing = [n for n in self._parameters if n not in tape.leaves]
        if frozen:
            what = f"{frozen[:4]} do not require gradients any more"
        elif was_whole and others:
            shapes = ", ".join(str(tuple(p.shape)) for p in others[:4])
            gone = f" (not reached now: {missing[:4]})" if missing else ""
            what = f"the loss also reaches parameters of shape {shapes}{gone}"
        else:
            return
        self._is_whole = was_whole
        raise CaptureError(
            f"The parameters are not those that this probe was made with: {what}. Make "
            "a new probe with the present ones, or give it the module, whose "
            "parameters it follows."
        )

    @contextmanager
    def extra_passes(self, tape: Tape) -> Iterator[None]:
        """What wraps the model takes no notice of passes in this context."""
        at_rest = nullcontext() if self.sharding is None else self.sharding.at_rest()
        with replicas_at_rest(tape.nodes), at_rest:
            yield

    def storages(self) -> set[int]:
        """Which storages hold what is the model's own."""
        if self._module is None:
            return set()
        held = [*self._module.parameters(), *self._module.buffers()]
        if self.sharding is not None:
            held = [t for t in held if not is_sharded(t)] + self.sharding.held
        # Addresses would not do: sharded parameters have none between their uses.
        return {t.untyped_storage()._cdata for t in held}
