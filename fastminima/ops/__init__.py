"""Kernels: each op has one meaning (its reference) and several implementations."""
