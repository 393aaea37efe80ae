"""One backward pass under observation."""
