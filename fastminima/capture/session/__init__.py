"""One backward pass under observation, from its hooks to what it brought.

attach.py       from a loss to the pass that is observed
states.py       what stands between attach and collect, and what comes of it
hooks.py        the session: hooks on uses, gradients and regions
program.py      uses whose steps are decided once for a recipe
steps.py        which step that is, for each kind of use
making.py       a use, and what its step is told of it
fused_steps.py  ... where gradients are made beside the norms
called.py       what Python computes for a use on a device, until it is launched
marked.py       the uses of a compiled region, as its own code shows them
tied.py         two uses of a table, computed together
taking.py       what the hooks of a program ask of Python
repeat.py       a whole pass like the one before
visit.py        what a use brings by its rule
norms.py        squared norms by parameter: rows of one table, or apart
held.py         what parameters hold in `.grad`
parts.py        contributions of all uses of a parameter, until none is missing
delivery.py     from the slot of a use to the parameter behind it
collector.py    from whole parameters to the statistics of the pass
gradients.py    the pass' own gradients, read as they are accumulated
fused.py        gradients that the pass leaves out and the kernels make
fusible.py      of which weights, and from which uses
moves.py        the way of a gradient from a use to its parameter, done by arithmetic
grouped.py      sessions side by side, for samples of very different lengths
timed.py        a session with a stop-watch, for audits
arrival.py      which pass has come, and what else is in it
"""
