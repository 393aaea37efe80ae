"""Tests of the curvature operators."""
