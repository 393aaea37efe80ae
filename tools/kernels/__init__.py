"""What can be known of a GPU kernel without a GPU; README.md says how to ask."""
