"""Congregational gradient descent: members that restart what is unfit."""
