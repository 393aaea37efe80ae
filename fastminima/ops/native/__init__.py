"""Calls of the native kernels on the CPU: a file a family."""
