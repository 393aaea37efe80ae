"""One row of named numbers a step, written where you look at your runs."""

from .csv_file import CSV
from .figure import plot, read
from .live import LiveFigure
from .loggers import JsonLines, Logger, TensorBoard
from .recorder import Monitor
from .run import RunFolder
from .spikes import SpikeDetector
from .trackers import MLflow, Trackio, WandB
from .watch import Watch, watch

__all__ = [
    "CSV",
    "JsonLines",
    "LiveFigure",
    "Logger",
    "MLflow",
    "Monitor",
    "RunFolder",
    "SpikeDetector",
    "TensorBoard",
    "Trackio",
    "WandB",
    "Watch",
    "plot",
    "read",
    "watch",
]
