"""What several examples share: data, networks, loops, measures, plots."""
