"""`fastminima report`: the page of a run."""

from __future__ import annotations

import argparse
import contextlib
import json

from ..report import Run, open_run
from ..report.page import summary, write
from ..report.server import PageServer
from .usage import UsageError

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    """Write the page, or serve it."""
    if options.serve:
        return _serve(options)
    found = open_run(options.run)
    output = write(found, options.output)
    if options.json:
        print(json.dumps({"output": str(output)} | summary(found), indent=1))
    else:
        print(f"{output}  ({_counted(found)})")
    return 0


def _counted(run: Run) -> str:
    """What a run has, and what of it could not be read."""
    counts = {"row": len(run.columns), "spike": len(run.spikes)}
    told = ", ".join(f"{n} {word}{'' if n == 1 else 's'}" for word, n in counts.items())
    return f"{told}; not read: {run.skipped} lines" if run.skipped else told


def _serve(options: argparse.Namespace) -> int:
    if options.output is not None:
        raise UsageError(
            "--serve writes no file, so it takes no --output. Leave one of the two out."
        )
    if not 0 <= options.port < 65536:
        raise UsageError(f"--port must be from 0 to 65535, got {options.port}.")
    with PageServer(open_run(options.run), options.port) as server:
        if options.json:
            print(json.dumps({"url": server.url}), flush=True)
        else:
            print(f"{server.url}  (Ctrl-C to end)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0
