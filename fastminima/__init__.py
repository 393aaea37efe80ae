"""Gradient statistics and sharpness inside your own PyTorch training loop."""

__version__ = "0.1.0"
