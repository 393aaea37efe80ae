"""The probe in Lightning, the Hugging Face Trainer and accelerate, by one line each."""

from .lightning import LightningProbe
from .watching import Watch, watch

__all__ = ["LightningProbe", "Watch", "watch"]
