"""Breuel (2015): training as many nearly independent subproblems."""
