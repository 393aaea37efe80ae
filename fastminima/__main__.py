"""`python -m fastminima`: the command line; without a word, what would run here."""

from __future__ import annotations

import sys

from .cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
