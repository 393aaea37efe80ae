"""What several examples share: data, result files, worker processes."""
