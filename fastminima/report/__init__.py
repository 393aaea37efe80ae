"""A run that was watched, read from disk and shown as a page.

From the files to the page, each by those before it:

    appended.py   lines of files that are still being written
    columns.py    rows as columns; tally.py, samples counted; run.py, all of a run
    thin.py       long series made short, medians and percentiles over windows
    traces.py     plotly's JSON; drawn.py makes a figure of it
    curves.py     figures over steps: noise.py, factors.py, sharpness.py; maps.py,
                  over layers
    now.py        the quantities as they stand, in words; tables.py, as HTML
    page.py       one file of it all; server.py follows a live run
"""

from .page import report
from .run import Run, open_run
from .server import serve

__all__ = ["Run", "open_run", "report", "serve"]
