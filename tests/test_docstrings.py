"""Every example in a docstring of the package runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import fastminima
from fastminima.ops.table import REGISTRY

MODULES = [
    module.name
    for module in pkgutil.walk_packages(fastminima.__path__, "fastminima.")
    if not module.name.endswith(("._native_ext", ".__main__"))
]


@pytest.fixture(autouse=True)
def _same_ops_after():
    """An example may define an op; the table of ops is as it was afterwards."""
    before = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    torch.manual_seed(0)
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.failed == 0, "the report is above"


def test_examples_are_there():
    finder = doctest.DocTestFinder()
    tests = finder.find(importlib.import_module("fastminima.ops.table"))
    assert sum(len(test.examples) for test in tests) >= 4
