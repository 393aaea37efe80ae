"""What CI or a developer runs: checks of the build, and tools for GPU kernels."""
