"""Kernels: each op has one meaning (its reference) and several implementations.

A family is one name everywhere: `<family>.py` has the definitions and their table, and
files of that name, or beginning with it, the ways.

    native/    calls of the kernels in csrc/cpu
    cuda/      calls of the kernels in csrc/cuda
    triton/    Triton kernels and their launchers
    cost/      which of several ways should be the fastest, from sizes alone
    <family>_pieces.py, _pieces.py    how PyTorch's operations hold little at a time
"""
