"""Kleinberg, Li, Yuan (2018): when SGD escapes local minima."""
