"""The types of arguments, for annotations of code that passes them on.

Each is the words that an argument takes, or what a destination of rows may be. A type
checker then finds a misspelt word where it is written, not where it arrives.

Example:
    >>> import torch, fastminima as fm
    >>> from fastminima.typing import Which
    >>> def extreme(H: torch.Tensor, which: Which) -> float:
    ...     return round(float(fm.top_eigenpairs(H, which=which).values[0]), 3)
    >>> extreme(torch.diag(torch.tensor([1.0, 2.0, 5.0])), "smallest")
    1.0
"""

from .callbacks.observer import BatchSize, Destination, OnError
from .capture.options import BatchNorm, Measure, Mode, Reduction
from .curvature._engines import Engine
from .monitor.optimizer_norm import Steps
from .optim.cyclic import First, Shape, Vary
from .optim.noise_scale import ScaleLr
from .optim.sampler import Last
from .spectrum.eigenpairs import Criterion, Precision, Which
from .spectrum.eigenpairs import Method as EigenpairMethod
from .spectrum.trace import Method as TraceMethod

__all__ = [
    "BatchNorm",
    "BatchSize",
    "Criterion",
    "Destination",
    "EigenpairMethod",
    "Engine",
    "First",
    "Last",
    "Measure",
    "Mode",
    "OnError",
    "Precision",
    "Reduction",
    "ScaleLr",
    "Shape",
    "Steps",
    "TraceMethod",
    "Vary",
    "Which",
]
