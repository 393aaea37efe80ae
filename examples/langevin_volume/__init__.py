"""Zhang et al. (2017): SGD, like Langevin dynamics, prefers minima of large volume."""
