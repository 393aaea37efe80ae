"""Speed and memory of fastminima beside the libraries one would use instead."""
