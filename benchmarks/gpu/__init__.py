"""Everything a GPU has to tell: the stages, and `python -m benchmarks.gpu`."""
