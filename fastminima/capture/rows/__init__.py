"""Whose row is whose."""
