"""What is raised when a graph cannot be read."""

__all__ = ["CaptureError"]


class CaptureError(RuntimeError):
    """The autograd graph of a loss cannot be read exactly; the message says why."""
