"""One graph understood."""
