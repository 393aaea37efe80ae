"""The page: one HTML file with all that it needs, or what a served one asks for."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

from .._optional import require
from . import tables
from .curves import curves, own_columns
from .drawn import Drawn
from .maps import layer_maps, norm_map
from .now import quantities
from .run import Run, open_run

__all__ = ["Section", "payload", "render", "report", "summary", "write"]

_ASSETS = Path(__file__).parent / "assets"
_SECTIONS = (
    "Now",
    "Loss",
    "Gradient norms",
    "Gradient variance",
    "Noise scale",
    "Temperature and the three factors",
    "Sharpness",
    "Layers",
    "Norms of samples",
    "Spikes",
    "Samples",
    "Your own columns",
    "Machine",
)
_SPIKE_NOTE = (
    "A step whose loss, or the norm of its mean gradient, was far from what was usual "
    "before it: z is how far, in robust standard deviations of the logarithm."
)
_SAMPLE_NOTE = (
    "At each logged step the samples with the largest gradients are written down. One "
    "that comes back again and again is mislabelled, broken, or what the model has yet "
    "to learn. Shares of layers are of |g_n|²."
)


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it.

    Attributes:
        title: the heading.
        html: text and tables; figures are drawn into their places in it.
    """

    title: str
    html: str

    @property
    def id(self) -> str:
        """Of its element, and of the link to it."""
        return self.title.lower().replace(" ", "-")


def report(
    path: str | PathLike[str], output: str | PathLike[str] | None = None
) -> Path:
    """Write the page of a run, and return where it is.

    The file holds its figures, their data and plotly's JavaScript, and asks no network
    for anything. A run that is still being written can be reported too.

    Args:
        path: the folder that `fm.monitor.watch` writes, or a file of rows.
        output: the HTML file; `report.html` in the folder, or beside a file of rows
            under its name, if None.

    Raises:
        FileNotFoundError: there is no run.
        ImportError: plotly is not installed.
    """
    run = open_run(path)
    return write(run, output)


def write(run: Run, output: str | PathLike[str] | None = None) -> Path:
    """Write the page of what a run has so far; in one piece, or not at all."""
    if output is None:
        is_folder = run.path.is_dir()
        to = run.path / "report.html" if is_folder else run.path.with_suffix(".html")
    else:
        to = Path(output)
    text = render(run)
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_name(to.name + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(to)
    return to


def payload(run: Run) -> dict[str, Any]:
    """All of the page that changes with the run: sections and figures."""
    drawn = _figures(run)
    return {
        "title": run.name,
        "sections": [
            {"id": s.id, "title": s.title, "html": s.html}
            for s in _sections(run, drawn)
        ],
        "figures": {d.id: d.figure for d in drawn},
    }


def render(run: Run, *, is_live: bool = False) -> str:
    """The whole HTML text; a live page asks its server for what is new."""
    found = payload(run)
    links = "".join(
        f'<li><a href="#{s["id"]}">{escape(s["title"])}</a></li>'
        for s in found["sections"]
    )
    body = "".join(
        f'<section id="{s["id"]}" aria-labelledby="{s["id"]}-title">{s["html"]}'
        "</section>"
        for s in found["sections"]
    )
    data = json.dumps({"figures": found["figures"], "live": is_live}, allow_nan=False)
    parts = {
        "TITLE": escape(run.name),
        "LINKS": links,
        "BODY": body,
        "CONNECT": "'self'" if is_live else "'none'",
        "STYLE": _asset("page.css"),
        # No "</script>" and no "<!--" can come from the run.
        "DATA": data.replace("<", "\\u003c"),
        "PLOTLY": _plotly(),
        "SCRIPT": _asset("page.js"),
    }
    pieces = _asset("page.html").split("@@")
    return "".join(parts.get(piece, piece) for piece in pieces)


def summary(run: Run) -> dict[str, Any]:
    """What a program wants to know of a run, for JSON."""
    steps = run.columns.steps
    is_finite = run.columns["is_finite"].values
    return {
        "run": str(run.path),
        "rows": len(steps),
        "first_step": float(steps[0]) if len(steps) else None,
        "last_step": float(steps[-1]) if len(steps) else None,
        "rows_not_finite": int((is_finite == 0).sum()),
        "lines_not_read": run.skipped,
        "spikes": len(run.spikes),
        "quantities": [q.to_dict() for q in quantities(run)],
        "samples_most_often": [
            {
                "id": s.id,
                "listed": s.listed,
                "largest": s.first,
                "norm": s.norm if math.isfinite(s.norm) else None,
                "step": s.step,
            }
            for s in (run.tally.most(10) if run.tally.is_named else [])
        ],
    }


def _figures(run: Run) -> list[Drawn]:
    drawn = [*curves(run.columns), *layer_maps(run)]
    norms = norm_map(run)
    drawn += [*([] if norms is None else [norms]), *own_columns(run.columns)]
    steps = run.columns.steps
    for one in drawn:
        # The same steps in all: markers would add a margin, and not every column has
        # all of them.
        one.figure["layout"]["xaxis"]["range"] = [
            float(steps.min()),
            float(steps.max()),
        ]
    return drawn


def _sections(run: Run, drawn: Iterable[Drawn]) -> Iterable[Section]:
    under: dict[str, list[Drawn]] = {}
    for figure in drawn:
        under.setdefault(figure.section, []).append(figure)
    texts = {
        "Now": tables.summary(run) + tables.now_table(quantities(run)),
        "Spikes": _note(_SPIKE_NOTE) + tables.spike_table(run.spikes),
        "Samples": _note(_SAMPLE_NOTE) + tables.sample_table(run),
        "Machine": tables.machine_table(run.about),
    }
    for title in _SECTIONS:
        figures = "".join(map(_figure, under.get(title, ())))
        text = texts.get(title, "")
        inner = f'<div data-text="{title}">{text}</div>' if text else ""
        if figures or inner:
            heading = f'<h2 id="{Section(title, "").id}-title">{escape(title)}</h2>'
            yield Section(title, heading + inner + figures)


def _note(text: str) -> str:
    return f'<p class="glossary">{escape(text)}</p>'


def _figure(drawn: Drawn) -> str:
    """The place of a figure: title, glossary, and an area that takes the keyboard."""
    title = escape(drawn.title, quote=True)
    return (
        f'<figure id="figure-{drawn.id}"><figcaption><h3>{title}</h3>'
        f'<p class="glossary">{escape(drawn.glossary)}</p></figcaption>'
        f'<div class="plot" data-figure="{drawn.id}" tabindex="0" role="group" '
        f'aria-roledescription="figure" aria-label="{title}. '
        'Arrow keys go from step to step."></div>'
        '<p class="read-out" aria-live="polite"></p></figure>'
    )


@functools.cache
def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


@functools.cache
def _plotly() -> str:
    """plotly.js, as the Python package has it."""
    otherwise = "`pip install 'fastminima[report]'`"
    offline = require("plotly.offline", "The report page", otherwise)
    return offline.get_plotlyjs()
