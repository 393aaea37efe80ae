"""Reading per-sample gradient statistics off the autograd graph.

A step goes down once, when a graph is read, and comes up once, in its backward pass.
Each room imports only those on the floors below it (`tests/test_layers.py`):

    probe.py         what users call: backward, or attach and collect; audit
    stepping.py      one pass after another, and what is kept between them
    accumulation.py  the passes of one step, counted and added up
    audit.py         the probe against plain autograd, parameter by parameter
    singles.py       whole gradients of a few samples, by plain autograd
    ranks.py         the statistics of all ranks, or of one alone
    minibatch.py     the variance of whole batches, which needs no graph
    session/         hooks on the uses of one graph, while a pass runs through it
    rules/           what each kind of node says of the gradients of its parameters
    reading/         one graph understood: its uses, whose rows are there; kept
    options.py       what users say of a probe and of a loss, checked once
    compiled/        operators in compiled steps that show the uses there
    rows/            whose row is whose: measured, fitted to a layout, guarded, followed
    graph/           autograd's graph as data: tape, names of nodes, saved tensors
    contributions/   the sample gradients of one parameter, without holding them
    errors.py        CaptureError, and what the engine's errors mean

To read it in half an hour: `rows/layout.py`, `graph/tape.py`, `reading/plan.py` (Use,
Slot, Path), `rules/dense.py` with `contributions/dense.py`, `session/hooks.py`,
`probe.py`. Regions, routes, guards and ranks are special cases, in a room of that name.

Words:

    use           a node where a parameter meets data; *slot*: the input it comes in by
    preparation   a node between a parameter and its use, such as a transpose
    layout        which rows are whose:  [B * T, d] -> sample of row r is r // T
    evidence      what the measuring passes showed of the rows
    recipe        how to read a graph; *structure*: what all graphs of one shape taught
    region        a node with a graph of its own (checkpoint, compiled), run again; or
                  *marked*: compiled with operators that show its uses
    contribution  what one use adds to the gradient of each sample
    program       the steps of a recipe that are decided once, run by the extension
    repeat        a whole pass like the one before, of which nothing is decided again
"""

from .audit import Audit
from .compiled.backend import compile
from .errors import CaptureError
from .minibatch import MinibatchVariance
from .probe import GradientProbe
from .singles import sample_gradients

__all__ = [
    "Audit",
    "CaptureError",
    "GradientProbe",
    "MinibatchVariance",
    "compile",
    "sample_gradients",
]
