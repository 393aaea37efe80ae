"""The papers' experiments, rerun with fastminima's probes."""
