"""What benchmarks ask of the package beyond its public names, in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fastminima import GradientProbe
from fastminima.capture.graph.tape import Tape
from fastminima.capture.rows.decode import Scheme
from fastminima.capture.rows.samples import Batch

__all__ = ["Pieces", "digits_of", "pieces_of", "uses_of"]


@dataclass(frozen=True)
class Pieces:
    """What a probe does before a backward pass of one graph, piece by piece."""

    nodes: int
    uses: int
    walk: Callable[[], object]
    read: Callable[[], object]  # walks, and recalls what is known of the graph
    hook: Callable[[], object]  # the uses; and lets go of them
    hook_with_gradients: Callable[[], object]


def pieces_of(probe: GradientProbe, losses: Tensor) -> Pieces:
    """Those of a probe that knows the graph of some losses."""
    samples, reader = Batch(len(losses)), probe._reader
    reading = reader.read(losses, samples)

    def hook(*, gradients: bool) -> None:
        collector = probe._attacher.collector()
        session = probe._attacher.session(
            reading, samples.count, collector, hook_gradients=gradients
        )
        session.close()

    return Pieces(
        nodes=len(reading.tape.nodes),
        uses=len(reading.recipe.plan.uses),
        walk=lambda: Tape([losses.grad_fn], reader.names),
        read=lambda: reader.read(losses, samples),
        hook=lambda: hook(gradients=False),
        hook_with_gradients=lambda: hook(gradients=True),
    )


def uses_of(probe: GradientProbe, losses: Tensor) -> int:
    """Places where parameters enter the graph of some losses."""
    return len(probe._reader.read(losses, Batch(len(losses))).recipe.plan.uses)


def digits_of(batch: int) -> int:
    """Passes that tell the samples of a batch apart."""
    return Scheme.of(batch, has_half=False).digits
