"""Autograd's graph as data."""
