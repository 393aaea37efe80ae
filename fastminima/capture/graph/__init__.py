"""Autograd's graph as data.

tape.py         one walk over a graph: nodes in order, edges, leaves
node.py         what is relied on of a node beyond its public interface
nodes.py        what each kind of node does, by its name: the one vocabulary
saved.py        saved tensors, without spending what a checkpoint recomputes
saved_names.py  what the batch normalisations of each backend call what they save
passes.py       extra backward passes, and whose each one is
undisturbed.py  our own computations inside a pass, out of everybody's modes
tracking.py     parameters that a graph reaches and a probe does not know yet
replay.py       regions compiled by `fastminima.compile`, run again uncompiled
sharding.py     parameters of `fully_shard`, whole during the passes
"""
