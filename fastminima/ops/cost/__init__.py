"""Which of several ways is expected to be the fastest, from sizes alone."""
