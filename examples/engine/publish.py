"""Records and figures that are part of the repository, and the tables made of them."""

from __future__ import annotations

import re
from pathlib import Path

from examples.catalog import EXPERIMENTS
from examples.common import records

from .conclude import Conclusion, conclude, draw
from .experiment import Experiment
from .folder import Folder

__all__ = ["check", "minutes", "publish", "published", "status", "tables"]

EXAMPLES = Path(__file__).resolve().parents[1]
_GALLERY_PAGE = EXAMPLES.parent / "docs/gallery.md"
KEPT = "laptop"
_REPOSITORY_TABLE = re.compile(r"(<!-- results -->\n).*?(<!-- end -->)", re.S)
_GALLERY = re.compile(r"(<!-- gallery -->\n).*?(<!-- end -->)", re.S)
_BLOCK = re.compile(r"(<!-- results:([\w.-]+) -->\n).*?(<!-- end -->)", re.S)


def published(experiment: Experiment, preset: str = KEPT) -> Conclusion | None:
    """What the committed records of a preset say; None if there are none."""
    found = records.read(_records(experiment, preset))
    if not found:
        return None
    settings = experiment.settings(preset, found[0]["dataset"])
    return conclude(experiment, settings, found)


def publish(folder: Folder) -> list[Path]:
    """Copy the records of a sweep into the repository, with a figure drawn from them.

    Raises:
        ValueError: for a sweep with settings of its own, or that is not finished.
    """
    experiment, settings = folder.experiment, folder.settings
    state = folder.state()
    if settings != experiment.settings(settings.preset, settings.dataset):
        raise ValueError(f"{folder.path} has settings of its own, not a preset's.")
    if state.finished < state.tasks:
        raise ValueError(
            f"{folder.path} has {state.finished} of {state.tasks} tasks. Run the rest."
        )
    path = _records(experiment, settings.preset)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    done = folder.finished()
    for key in folder.tasks:
        records.append(path, done[key])
    conclusion = published(experiment, settings.preset)
    assert conclusion is not None
    return [path, *draw(conclusion, _figure(experiment, settings.preset))]


def status(experiment: Experiment) -> str:
    """ "run" if its laptop preset is in the repository, "partly run", or "not run"."""
    conclusion = published(experiment)
    if conclusion is None:
        return "not run"
    return "run" if len(conclusion.rows) >= conclusion.expected else "partly run"


def minutes(experiment: Experiment) -> dict[str, float]:
    """Minutes with two workers by preset, if known; laptop is from its records."""
    conclusion = published(experiment)
    found = dict(experiment.minutes)
    if conclusion is not None:
        found[KEPT] = float(f"{conclusion.minutes / 2:.2g}")
    return found


def tables() -> dict[Path, str]:
    """Every page of examples, its tables made anew from the committed records."""
    paths = [EXAMPLES / "README.md", _GALLERY_PAGE]
    folders = {EXAMPLES / e.folder for e in EXPERIMENTS.values()}
    paths += sorted(path for at in folders for path in at.glob("README*.md"))
    return {path: _rewritten(path.read_text()) for path in paths if path.exists()}


def check() -> list[Path]:
    """Pages whose tables are not those of the records."""
    return [path for path, text in tables().items() if text != path.read_text()]


def _rewritten(text: str) -> str:
    text = _REPOSITORY_TABLE.sub(lambda m: m[1] + _table() + m[2], text)
    text = _GALLERY.sub(lambda m: m[1] + _gallery() + m[2], text)
    return _BLOCK.sub(lambda m: m[1] + _block(EXPERIMENTS[m[2]]) + m[3], text)


def _table() -> str:
    lines = [
        "| id | claim | paper's number | ours (laptop preset; ± over seeds, [95 %]) "
        "| verdict | command |",
        "|---|---|---|---|---|---|",
    ]
    for e in EXPERIMENTS.values():
        conclusion = published(e)
        ours = verdict = "not run"
        if conclusion is not None:
            data = conclusion.settings.dataset
            ours = f"{data}: " * bool(data) + conclusion.verdict.short
            verdict = f"**{conclusion.verdict.outcome}**"
            if e.exploratory:
                verdict += " (exploratory)"
        cells = [
            f"[{e.id}]({e.folder}/README.md)",
            f"{e.claim} ({e.paper})",
            e.paper_number or "none quoted",
            ours,
            verdict,
            f"`python -m examples run {e.id} --preset laptop`",
        ]
        lines.append("| " + " | ".join(_cell(c) for c in cells) + " |")
    return "\n".join(lines) + "\n"


def _gallery() -> str:
    """A figure for each experiment, with its claim, verdict and command."""
    return "".join(_picture(e) for e in EXPERIMENTS.values() if published(e))


def _picture(e: Experiment) -> str:
    conclusion = published(e)
    assert conclusion is not None
    folder = f"../examples/{e.folder}"
    outcome = conclusion.verdict.outcome + " (exploratory)" * bool(e.exploratory)
    return (
        f"<div markdown>\n\n[![{e.id}]({folder}/figures/{e.id}.png)]"
        f"({folder}/{_page(e)})\n\n"
        f"**{outcome}.** {e.claim} ({e.paper})\n\n"
        f"`python -m examples run {e.id} --preset {KEPT}`\n\n</div>\n"
    )


def _page(e: Experiment) -> str:
    """The file with the results of an experiment, in its folder."""
    pages = sorted((EXAMPLES / e.folder).glob("README*.md"))
    mark = f"<!-- results:{e.id} -->"
    return next(page.name for page in pages if mark in page.read_text())


def _block(e: Experiment) -> str:
    conclusion = published(e)
    if conclusion is None:
        return "Not run yet.\n"
    p, verdict = conclusion.provenance, conclusion.verdict
    about = (
        f"*{conclusion.settings.dataset or 'No data set'}, {len(conclusion.rows)} of "
        f"{conclusion.expected} runs, {conclusion.minutes:.1f} processor minutes, "
        f"torch {p['torch']}, {p['machine']}, {p['time']}.*"
    )
    parts = [f"**{verdict.outcome}**: {verdict.sentence}", about]
    if e.exploratory:
        parts.append(f"Exploratory: {e.exploratory}")
    if conclusion.failures:
        listed = "; ".join(f"{n} times {m}" for m, n in conclusion.failures.items())
        parts.append(f"Failed: {listed}")
    if verdict.table:
        parts.append(f"```text\n{verdict.table}\n```")
    parts.append(f"![{e.claim}](figures/{e.id}.png)")
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _records(experiment: Experiment, preset: str) -> Path:
    return EXAMPLES / experiment.folder / "records" / f"{experiment.id}-{preset}.jsonl"


def _figure(experiment: Experiment, preset: str) -> Path:
    name = experiment.id if preset == KEPT else f"{experiment.id}-{preset}"
    return EXAMPLES / experiment.folder / "figures" / f"{name}.png"
