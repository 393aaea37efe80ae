"""Hessian products by tangents: an R-operator over the recorded graph.

either.py       what to use: tangents, or another graph where they would be wrong
graph.py        the class that the rest is for: recorded once, multiplied often
steps.py        the graph as a list of steps, each with its rule and its wiring
plan.py         which steps a product takes within some parameters
leaves.py       where what belongs to a parameter is added up
saved.py        what nodes have saved, and whether it is what it was
rule.py         what a rule is, and the one that holds for every node
linear.py       nodes that only move or add numbers
dense.py        products of matrices
convolution.py  convolutions
pointwise.py    activations and products, element by element
normal.py       layer norm
softmax.py      softmax and its logarithm
losses.py       losses that are sums over numbers
table.py        which rule is whose
"""

from .either import EitherGraph
from .graph import ClosedForm, TangentGraph
from .rule import NotCovered

__all__ = ["ClosedForm", "EitherGraph", "NotCovered", "TangentGraph"]
