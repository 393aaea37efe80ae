"""Tests of the eigensolvers and estimators."""
