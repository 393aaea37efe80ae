"""The command line, `fastminima` or `python -m fastminima`.

parser.py    words and options; errors become one line
machine.py   without a word: what is installed, and which kernels would run
report.py    the page of a run; tail.py, its last rows in the terminal
target.py    a model and a loss from `module:function`
audit.py     these beside plain autograd
doctor.py    what would be slow or refused; findings.py, what it looks at
"""

from .parser import main

__all__ = ["main"]
