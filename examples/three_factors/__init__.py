"""Jastrzebski et al. (2017): three factors influencing minima in SGD."""
