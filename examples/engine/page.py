"""All experiments on one page of HTML that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from .conclude import Conclusion
from .experiment import Experiment
from .outcome import HELD, NOT_HELD, UNDECIDED

__all__ = ["page"]

_COLOURS = {HELD: "#1b7f4d", NOT_HELD: "#b3261e", UNDECIDED: "#8a6d00"}

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto;
  max-width: 70rem; padding: 1.5rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 0 0 .3rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 2rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem;
  border-bottom: 1px solid #e2e2e2; }
th { color: #666; font-weight: 600; }
section { border-top: 2px solid #eee; padding: 1.2rem 0; }
img { max-width: 100%; height: auto; }
pre { overflow-x: auto; background: #f7f7f7; padding: .7rem; font-size: 12.5px;
  line-height: 1.35; }
code { background: #f4f4f4; padding: .1rem .25rem; }
.badge { color: #fff; border-radius: .25rem; padding: .05rem .5rem; font-size: .8rem;
  font-weight: 600; white-space: nowrap; }
.small { color: #666; font-size: .85rem; }
a { color: #1a5fb4; text-decoration: none; }
@media print { section { break-inside: avoid; } }
@media (max-width: 40rem) { td:nth-child(3), th:nth-child(3) { display: none; } }
"""


def page(experiments: Sequence[Experiment], conclusions: dict[str, Conclusion]) -> str:
    """The page; an experiment without a conclusion is listed as not run."""
    rows = "\n".join(_line(e, conclusions.get(e.id)) for e in experiments)
    sections = "\n".join(
        _section(conclusions[e.id]) for e in experiments if e.id in conclusions
    )
    counts = ", ".join(
        f"{sum(c.verdict.outcome == o for c in conclusions.values())} {o}"
        for o in (HELD, NOT_HELD, UNDECIDED)
    )
    share = f"{len(conclusions)} of {len(experiments)} experiments"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastminima: reruns</title><style>{_STYLE}</style></head><body>
<h1>Reruns</h1>
<p>{share}: {counts}. A claim is HELD if the
interval of every statement that it consists of (95 % together) lies on its side, NOT
HELD if one lies on the other side, UNDECIDED otherwise.</p>
<table><thead>
<tr><th>id</th><th>claim</th><th>the paper's number</th><th>verdict</th></tr>
</thead><tbody>
{rows}
</tbody></table>
{sections}
</body></html>
"""


def _line(e: Experiment, conclusion: Conclusion | None) -> str:
    badge = _badge(conclusion) if conclusion else '<span class="small">not run</span>'
    name = f'<a href="#{_text(e.id)}">{_text(e.id)}</a>' if conclusion else _text(e.id)
    return (
        f"<tr><td>{name}</td><td>{_text(e.claim)}<br>"
        f'<span class="small">{_text(e.paper)}</span></td>'
        f"<td>{_text(e.paper_number or 'none quoted')}</td><td>{badge}</td></tr>"
    )


def _section(c: Conclusion) -> str:
    e, p = c.experiment, c.provenance
    about = (
        f"{c.settings.preset}, {c.settings.dataset or 'no data set'}; {len(c.rows)} of "
        f"{c.expected} runs; {c.minutes:.1f} processor minutes; fastminima "
        f"{p['fastminima']}, torch {p['torch']}; {p['machine']}; {p['time']}; "
        f"code {p['code']}"
    )
    failed = "".join(
        f"<p>Failed, {n} times: {_text(message)}</p>"
        for message, n in c.failures.items()
    )
    table = f"<pre>{_text(c.verdict.table)}</pre>" if c.verdict.table else ""
    command = f"python -m examples run {e.id} --preset {c.settings.preset}"
    note = f"<p>Exploratory: {_text(e.exploratory)}</p>" if e.exploratory else ""
    return f"""<section id="{_text(e.id)}">
<h2>{_text(e.id)}: {_text(e.claim)}</h2>
<p>{_badge(c)} {_text(c.verdict.sentence)}</p>
{note}{failed}
{_picture(c)}
{table}
<p class="small">{_text(e.paper)}. {_text(about)}<br><code>{_text(command)}</code></p>
</section>"""


def _picture(c: Conclusion) -> str:
    import matplotlib.pyplot as plt

    if not c.rows:
        return ""
    figure = c.experiment.draw(c.settings, c.rows)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{_text(c.experiment.claim)}" src="data:image/png;base64,{data}">'


def _badge(c: Conclusion) -> str:
    outcome = c.verdict.outcome
    return (
        f'<span class="badge" style="background:{_COLOURS[outcome]}">{outcome}</span>'
    )


def _text(text: str) -> str:
    return html.escape(text)
