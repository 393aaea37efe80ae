"""Words and options of the command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .._optional import require
from . import audit, doctor, machine, report, tail
from .target import HELP as TARGET
from .usage import UsageError

__all__ = ["main", "make_parser"]

_SHELLS = ("bash", "zsh", "fish", "tcsh")
_ABOUT = """\
Watch what decides where SGD ends up. Without a command: what is installed here, and
which implementation of each operation would run."""
_EXAMPLES = """\
examples:
  fastminima report runs/a            make runs/a/report.html
  fastminima report runs/a --serve    follow a run that is still going, in a browser
  fastminima tail runs/a              its last rows, in this terminal
  fastminima doctor train:setup       what would be slow or refused, before a run
  fastminima audit train:setup        every parameter beside plain autograd"""
_REPORT = """\
Make one HTML file of a run, which needs no network: curves, layers, spikes and the
samples behind them, the paper's quantities with their intervals. RUN is the folder that
fm.monitor.watch(to=...) writes, or a file of rows (.jsonl)."""
_TAIL = """\
Show a run's last rows as a table that follows it: loss, noise scale with its interval,
sharpness as a bar beside 2/eta, spikes."""
_AUDIT = f"""\
Compare per-sample norms with plain autograd, parameter by parameter, and
Hessian-vector products with what they should be. Exits with 1 where something is wrong.

{TARGET}"""
_DOCTOR = f"""\
Say what would be slow or refused in a model, why, and what to do, before a run. Exits
with 1 where something would be refused.

{TARGET}"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and do what it says; returns the exit code.

    0 if all is well, also where the reader has closed the pipe; 1 where an audit or the
    doctor found something wrong; 2 where the command could not be carried out.
    """
    options = make_parser().parse_args(arguments)
    try:
        code = options.do(options)
        sys.stdout.flush()  # a closed pipe shows here, and not at the interpreter's end
        return code
    except BrokenPipeError:  # `| head`: nobody reads on
        # The interpreter flushes once more at its end, into something that takes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ImportError, OSError, UsageError) as error:
        if hasattr(options, "target") and not isinstance(error, UsageError):
            raise  # the user's own code, whose traceback is wanted
        print(f"error: {error}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    """The parser, by itself for completion."""
    is_script = Path(sys.argv[0]).name == "fastminima"
    parser = argparse.ArgumentParser(
        prog="fastminima" if is_script else "python -m fastminima",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--version", action="version", version=f"fastminima {machine.version()}"
    )
    parser.set_defaults(do=machine.run)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_report(commands)
    _add_tail(commands)
    _add_audit(commands)
    _add_doctor(commands)
    completion = _command(
        commands,
        "completion",
        "print a shell's completion script",
        "Print what a shell needs to complete commands and options, for example:\n"
        "  fastminima completion bash > ~/.local/share/bash-completion/completions/"
        "fastminima",
        _completion,
    )
    completion.add_argument("shell", choices=_SHELLS)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    line: str,
    text: str,
    do: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=line,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Left out it must not undo a --json before the command.
    shown = "print JSON in place of text"
    parser.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help=shown
    )
    parser.set_defaults(do=do)
    return parser


def _add_report(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> None:
    parser = _command(commands, "report", "a run as a page", _REPORT, report.run)
    parser.add_argument("run", metavar="RUN", help="folder of a run, or a .jsonl file")
    parser.add_argument(
        "--output", metavar="FILE", help="the HTML file (default: RUN/report.html)"
    )
    parser.add_argument(
        "--serve",
        action="store_true",
        help="serve the page on this machine and follow the run, until interrupted",
    )
    parser.add_argument(
        "--port", type=int, default=0, help="of --serve (default: a free one)"
    )


def _add_tail(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "tail", "a run in the terminal", _TAIL, tail.run)
    parser.add_argument("run", metavar="RUN", help="folder of a run, or a .jsonl file")
    parser.add_argument(
        "--rows", type=int, default=12, help="of the table (default: %(default)s)"
    )
    parser.add_argument("--once", action="store_true", help="print it once and end")
    parser.add_argument(
        "--every",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="how often to look for new rows (default: %(default)s)",
    )


def _add_audit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    line = "a model and its loss beside plain autograd"
    parser = _command(commands, "audit", line, _AUDIT, audit.run)
    parser.add_argument("target", metavar="MODULE:FUNCTION")
    parser.add_argument(
        "--only", choices=("gradients", "curvature"), help="one of the two (both)"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=4,
        help="differentiated one by one (default: %(default)s)",
    )
    _add_batchnorm(parser)


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    line = "what would be slow or refused, before a run"
    parser = _command(commands, "doctor", line, _DOCTOR, doctor.run)
    parser.add_argument("target", metavar="MODULE:FUNCTION")
    _add_batchnorm(parser)


def _add_batchnorm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batchnorm",
        choices=("error", "rows", "frozen"),
        default="error",
        help="what the probe does about batch normalisation (default: %(default)s)",
    )


def _completion(options: argparse.Namespace) -> int:
    """Print the script of one shell."""
    shtab = require("shtab", "Completion", "`pip install 'fastminima[cli]'`")
    parser = make_parser()
    parser.prog = "fastminima"
    print(shtab.complete(parser, shell=options.shell))
    return 0
