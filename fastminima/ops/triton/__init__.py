"""Triton kernels: a file a family, each launcher in the table of its op."""
