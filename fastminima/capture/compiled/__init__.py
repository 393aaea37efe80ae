"""Statistics inside compiled steps: operators in the backward graph that is compiled.

backend.py      `compile`, and the backends whose graphs are marked
inserting.py    the pass over a backward graph: an operator beside each use
operations.py   which eager node an operation of that graph is
tracing.py      from a parameter's gradient back to the uses that it is a sum of
steps.py        what moves it on the way, or adds parts up
nodes.py        what is asked of the graph's nodes
marks.py        what such an operator says of itself, as a string in compiled code
operators.py    the operators, and who is told what they are given

A region that cannot be marked is run again, uncompiled, on steps that are probed
(`graph/replay.py`).
"""
