"""Reading per-sample gradient statistics off the autograd graph."""

from .audit import Audit
from .errors import CaptureError
from .graph.compiled import compile
from .minibatch import MinibatchVariance
from .probe import GradientProbe

__all__ = ["Audit", "CaptureError", "GradientProbe", "MinibatchVariance", "compile"]
