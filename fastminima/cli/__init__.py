"""The command line, `fastminima` or `python -m fastminima`.

A file a command, which imports what it needs from the layers below:

    parser.py    words and options; usage.py, what is wrong with a command
    machine.py   without a word: what is installed, and which kernels would run
    report.py    the page of a run; tail.py, its last rows in the terminal
    target.py    a model and a loss from `module:function`
    audit.py     these beside plain autograd
    doctor.py    what would be slow or refused, by model_checks.py and loss_checks.py,
                 which give findings.py
"""

from .parser import main

__all__ = ["main"]
