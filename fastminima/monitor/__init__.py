"""One row of named numbers a step, written where you look at your runs."""

from .figure import plot, read
from .loggers import JsonLines, Logger, TensorBoard, WandB
from .recorder import Monitor
from .run import RunFolder
from .spikes import SpikeDetector
from .watch import Watch, watch

__all__ = [
    "JsonLines",
    "Logger",
    "Monitor",
    "RunFolder",
    "SpikeDetector",
    "TensorBoard",
    "WandB",
    "Watch",
    "plot",
    "read",
    "watch",
]
