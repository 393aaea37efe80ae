"""Calls of the CUDA kernels: a file a family, each in the table of its op."""
