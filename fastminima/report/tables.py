"""What the page says in words and tables, as HTML; what comes from a run, escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from .now import Quantity
from .run import Run
from .tally import Seen, Tally, finite
from .thin import segments

__all__ = [
    "machine_table",
    "now_table",
    "number",
    "sample_table",
    "spike_table",
    "summary",
    "table",
]

_SPIKES = 100  # on the page, the newest
_SAMPLES = 25


def number(value: object, digits: int = 4) -> str:
    """A number for readers; a dash where there is none."""
    known = finite(value)
    return f"{known:.{digits}g}" if math.isfinite(known) else "–"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """A table; cells are HTML already. It scrolls by itself where it is too wide."""
    heads = "".join(
        f'<th scope="col" role="columnheader">{escape(name)}</th>' for name in head
    )
    body = "".join(_row(head, row) for row in rows)
    label = escape(caption, quote=True)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
        f'<table role="table" class="of-{len(head)}">'
        f"<caption>{escape(caption)}</caption>"
        f'<thead role="rowgroup"><tr role="row">{heads}</tr></thead>'
        f'<tbody role="rowgroup">{body}</tbody>'
        "</table></div>"
    )


def _row(head: Sequence[str], cells: Sequence[str]) -> str:
    """A row. On narrow screens its cells stand below each other, each with its head."""
    found = "".join(
        f'<td role="cell" data-head="{escape(name, quote=True)}">{cell}</td>'
        for name, cell in zip(head, cells, strict=True)
    )
    return f'<tr role="row">{found}</tr>'


def summary(run: Run) -> str:
    """How long the run is, whether it was resumed, what could not be read."""
    steps = run.columns.steps
    if not len(steps):
        return "<p>No row has been written yet.</p>"
    parts = [f"{len(steps)} rows, steps {steps[0]:g} to {steps[-1]:g}."]
    if finite(run.about.get("every")) > 1:
        parts.append(f"A row every {run.about['every']} steps.")
    starts = [part.start for part in segments(steps)][1:]
    if starts:
        places = ", ".join(f"{steps[start]:g}" for start in starts[:8])
        parts.append(f"The run was resumed: its step goes back to {places}.")
    if _has_no_ratio(run):
        name = (run.about.get("optimizer") or {}).get("name")
        steps_of = f"{escape(str(name))} takes" if name else "the optimizer takes"
        parts.append(
            "There is no ratio and no temperature: they are those of SGD with one "
            f"learning rate, and {steps_of} other steps. With "
            "<code>precondition=True</code> they are those in the norm of these."
        )
    finite_rows = run.columns["is_finite"]
    wrong = finite_rows.steps[finite_rows.values == 0]
    if len(wrong):
        plural = "row has" if len(wrong) == 1 else "rows have"
        parts.append(
            f"<strong>{len(wrong)} {plural} numbers that are not finite</strong>, the "
            f"first at step {wrong[0]:g}."
        )
    if run.skipped:
        parts.append(f"{run.skipped} lines of its files could not be read.")
    return f"<p>{' '.join(parts)}</p>"


def _has_no_ratio(run: Run) -> bool:
    """Whether an optimizer is known, and its steps have no temperature."""
    names = run.columns.names
    has_rate = any(name.startswith("factors/learning_rate") for name in names)
    return has_rate and "factors/ratio" not in names


def now_table(found: Sequence[Quantity]) -> str:
    """The quantities as they stand, a row each."""
    if not found:
        return "<p>The rows have none of the paper's quantities.</p>"
    rows = [
        (
            f"<strong>{escape(q.name)}</strong>",
            number(q.value),
            _between(q),
            number(q.step, 7),
            escape(q.words),
        )
        for q in found
    ]
    head = ("quantity", "value", "interval", "step", "in words")
    return table(head, rows, "The paper's quantities at the end of the run")


def _between(q: Quantity) -> str:
    if not (math.isfinite(q.low) or math.isfinite(q.high)):
        return escape(q.interval)
    high = number(q.high) if math.isfinite(q.high) else "no upper end"
    return f"{number(q.low)} to {high}<br><small>{escape(q.interval)}</small>"


def spike_table(spikes: Sequence[Mapping[str, Any]]) -> str:
    """Spikes, the newest first, each with its samples."""
    if not spikes:
        return "<p>No spike was recorded.</p>"
    rows = [
        (
            number(spike.get("step"), 7),
            escape(str(spike.get("what", ""))),
            number(spike.get("value")),
            f"{number(spike.get('usual'))} ± {number(spike.get('scale'), 2)}",
            number(spike.get("z"), 3),
            _samples(spike.get("samples")),
        )
        for spike in reversed(spikes[-_SPIKES:])
    ]
    head = ("step", "of the", "value", "usual", "z", "largest samples")
    shown = f", the newest {_SPIKES}" if len(spikes) > _SPIKES else ""
    plural = "spike" if len(spikes) == 1 else "spikes"
    return table(head, rows, f"{len(spikes)} {plural}{shown}")


def _samples(samples: object, most: int = 3) -> str:
    if not isinstance(samples, list) or not samples:
        return "–"
    lines = []
    for sample in samples[:most]:
        words = [f"norm {number(sample.get('norm'))}"]
        if sample.get("loss") is not None:
            words.append(f"loss {number(sample['loss'])}")
        if sample.get("share") is not None:
            words.append(f"{finite(sample['share']):.0%} of the mean gradient")
        elif finite(sample.get("share_at_most")) < 1:
            most_of = f"{finite(sample['share_at_most']):.0%}"
            words.append(f"at most {most_of} of the mean gradient")
        if sample.get("rank"):
            words.append(f"rank {sample['rank']}")
        layers = _layers(sample.get("layers") or {})
        tail = f"<br><small>{layers}</small>" if layers else ""
        lines.append(f"<li>{_id(sample)}: {', '.join(words)}{tail}</li>")
    more = len(samples) - most
    if more > 0:
        lines.append(f"<li><small>and {more} more</small></li>")
    return f"<ul>{''.join(lines)}</ul>"


def _id(sample: Mapping[str, Any]) -> str:
    return _name(sample.get("id", sample.get("index")))


def _name(value: object, most: int = 60) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    short = text if len(text) <= most else text[: most - 1] + "…"
    return f"<code>{escape(short)}</code>"


def _layers(shares: Mapping[str, Any], most: int = 3) -> str:
    known = sorted(shares.items(), key=lambda item: -finite(item[1]))[:most]
    return ", ".join(
        f"{escape(str(name))}: {finite(share):.0%}"
        for name, share in known
        if math.isfinite(finite(share))
    )


def sample_table(run: Run) -> str:
    """The samples that were among the largest most often, or the largest ones."""
    if not run.tally.steps:
        return (
            "<p>No samples were recorded: the run has no <code>samples.jsonl</code>, "
            "or it is empty.</p>"
        )
    if not run.tally.is_named:
        return _nameless(run.tally)
    most = run.tally.most(_SAMPLES)
    rows = [_seen(seen, run.tally.steps) for seen in most]
    head = ("sample", "listed", "largest", "norm at most", "at step", "layers")
    caption = (
        f"Of {len(run.tally)} samples that were among the largest of some step, those "
        "that were so most often"
    )
    return table(head, rows, caption)


def _nameless(tally: Tally) -> str:
    """Samples known by their step and their index in its batch alone."""
    rows = [
        (
            number(sample.get("step"), 7),
            _place(sample),
            number(sample.get("norm")),
            number(sample.get("loss")),
            number(sample.get("z"), 3),
            _layers(sample.get("layers") or {}) or "–",
        )
        for sample in tally.largest(_SAMPLES)
    ]
    head = ("step", "index in the batch", "norm", "loss", "z", "layers")
    said = (
        "<p>The samples have no ids, only their index in a batch, so which ones come "
        "back is not known: <code>w.backward(losses, ids=...)</code> names them.</p>"
    )
    return said + table(head, rows, "The samples with the largest norms of all steps")


def _place(sample: Mapping[str, Any]) -> str:
    """Its index, and of which of several batches or ranks."""
    names = {"microbatch": "batch", "rank": "rank"}
    of = [f"{word} {sample[key]}" for key, word in names.items() if sample.get(key)]
    return _name(sample.get("index")) + "".join(f", {escape(one)}" for one in of)


def _seen(seen: Seen, steps: int) -> tuple[str, ...]:
    whole = seen.listed or 1
    layers = {name: total / whole for name, total in seen.layers.most_common(3)}
    return (
        _name(seen.id),
        f"{seen.listed} of {steps} steps",
        f"{seen.first} times",
        number(seen.norm),
        number(seen.step, 7),
        _layers(layers) or "–",
    )


def machine_table(about: Mapping[str, Any], skipped: Iterable[str] = ()) -> str:
    """What ran: versions, machine, model and optimizer."""
    if not about:
        return "<p>The run has no <code>run.json</code>, so this is not known.</p>"
    hidden = {"layers", "schema", *skipped}
    rows = [
        (escape(key.replace("_", " ")), _value(value))
        for key, value in about.items()
        if key not in hidden
    ]
    if isinstance(about.get("layers"), list):
        rows.append(("layers", str(len(about["layers"]))))
    return table(("what", "value"), rows, "Machine, versions and what was trained")


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        inner = ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
        return escape(inner)
    return escape(_plain(value))


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{k} {_plain(v)}" for k, v in value.items()) + ")"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value)
