"""Whose row is whose: measured, fitted to a layout, guarded, followed.

layout.py         which rows are which sample's: regular, or a label for each
samples.py        what a sample is: an index of the batch, or a packed segment
measure.py        the measuring passes: samples weighted by powers of two
fingerprints.py   norms of the rows of a gradient in each of them
decode.py         from those norms to the sample of each row, under noise
evidence.py       what was seen of one graph, and the questions asked of it
batch_axis.py     where the samples are below a scalar loss
gates.py          what is closed in a graph, opened while measuring
guards.py         what must stay the same for a layout to hold
own_functions.py  the same of functions that users wrote
shared.py         rows that all samples share until zeros give them to one
routes.py         rows that data sends elsewhere, followed by their indices
stretches.py      nodes through which rows stay what they are, for routes
"""
