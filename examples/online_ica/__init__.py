"""Li, Wang, Liu (2016): the three phases of online ICA by SGD."""
