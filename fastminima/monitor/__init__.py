"""One row of named numbers a step, written where you look at your runs."""

from .figure import plot, read
from .loggers import JsonLines, Logger, TensorBoard, WandB
from .recorder import Monitor

__all__ = ["JsonLines", "Logger", "Monitor", "TensorBoard", "WandB", "plot", "read"]
