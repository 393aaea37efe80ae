"""What is raised when a graph cannot be read, and what the engine's errors mean."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["CaptureError", "explaining"]


class CaptureError(RuntimeError):
    """The autograd graph of a loss cannot be read exactly; the message says why."""


# What PyTorch says when ...
_SPENT_GRAPH = "backward through the graph a second time"
_REENTRANT = "When use_reentrant=True, torch.utils.checkpoint is incompatible"


class explaining:
    """Says of the engine's errors what they mean for a probe.

    What was found wrong `earlier` is why a pass could not run.
    """

    def __init__(self, earlier: Callable[[], Exception | None] = lambda: None) -> None:
        self._earlier = earlier

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, RuntimeError):
            known = self._earlier() or _explained(error)
            if known is not None:
                raise known from error


def _explained(error: RuntimeError) -> CaptureError | None:
    """What an error of the engine means for a probe."""
    if _SPENT_GRAPH in str(error):
        return CaptureError(
            "The backward pass of this loss has already run and its graph is gone. "
            "Compute the loss again, or keep the graph with retain_graph=True."
        )
    if _REENTRANT in str(error):
        return CaptureError(
            "An audit and a pass with frozen statistics differentiate through "
            "torch.autograd.grad, which checkpoint(use_reentrant=True) does not allow. "
            "Use use_reentrant=False for it."
        )
    if "linear_cross_entropy chunked backward called twice" in str(error):
        return CaptureError(
            "The loss was computed by linear_cross_entropy in chunks, which lets its "
            "backward pass run only once. Pass "
            "LinearCrossEntropyOptions(allow_retain_graph=True), or options=None."
        )
    return None
