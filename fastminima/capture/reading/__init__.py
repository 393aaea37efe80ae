"""One graph understood: its uses, and whose the rows are there; remembered.

reader.py      recall what a structure taught, else measure and remember
attempt.py     one measurement of a graph, from the passes to its recipe
plan.py        where each parameter meets data: uses, slots, paths
fit.py         layouts of the uses from evidence, and what must hold for them
axis_shown.py  whether data show that a scalar loss' axis is the samples'
recipe.py      how to read a graph, and the regions in it
memory.py      one structure in all the sizes it was met in
regions.py     checkpoints and compiled regions, whose graphs come with the pass
marked.py      compiled regions that show their uses themselves
mixing.py      layers that mix samples by what they are
refusals.py    every "cannot be read" that is seen in the graph; where in the model
tracked.py     the parameters and tensors of the model
jumps.py       jumps of a loss or a norm, which are reasons to look again
"""
