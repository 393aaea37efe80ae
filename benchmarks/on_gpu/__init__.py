"""What `benchmarks/gpu.py` runs on a GPU, each part in a process of its own."""
