"""Runs the pages that set a peer's code beside ours, and compares the results.

    python -m benchmarks.pages docs/coming_from/*.md

The peers have to be installed. On such a page a block of the peer's code is fenced as
`py`, one of ours as `python`; a pair lies in `<div class="beside" ...>`, and leaves its
results in `theirs` and `ours`. They are compared to float32 rounding, or to the
relative tolerance `data-rtol`, where either is an estimate. `data-raises` names the
error that the peer's block ends with.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BESIDE = re.compile(r'<div class="beside"(?P<options>[^>]*)>|</div>')
BLOCK = re.compile(r"^```(?P<kind>py|python)\n(?P<code>.*?)^```", re.M | re.S)
OPTION = re.compile(r'data-(\w+)="([^"]*)"')
ROUNDING = 2e-4  # of values relative to the largest one: float32, sums in other orders


@dataclass(frozen=True)
class Block:
    """Code of a page; a pair is made of two with the same place."""

    code: str
    is_theirs: bool
    pair: int | None
    options: dict[str, str]


def blocks(text: str) -> Iterator[Block]:
    """The code of a page in its order, padded so that tracebacks have its lines."""
    opened = list(BESIDE.finditer(text))
    for found in BLOCK.finditer(text):
        before = [mark for mark in opened if mark.end() <= found.start()]
        mark = before[-1] if before and before[-1]["options"] is not None else None
        yield Block(
            "\n" * text[: found.start("code")].count("\n") + found["code"],
            found["kind"] == "py",
            None if mark is None else mark.start(),
            {} if mark is None else dict(OPTION.findall(mark["options"])),
        )


def run(page: Path) -> int:
    """Run a page and return how many pairs were compared."""
    torch.manual_seed(0)
    compared = 0
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page.read_text(encoding="utf-8")):
        code = compile(block.code, str(page), "exec")
        if block.is_theirs and "raises" in block.options:
            expect(block.options["raises"], code, names)
            continue
        exec(code, names)
        if block.pair is None or block.is_theirs or "raises" in block.options:
            continue
        compare(names.pop("theirs"), names.pop("ours"), block.options, page)
        compared += 1
    return compared


def expect(error: str, code: Any, names: dict[str, Any]) -> None:
    """Run code that has to end with an error of this name."""
    try:
        exec(code, names)
    except Exception as met:
        if type(met).__name__ != error:
            raise
    else:
        raise AssertionError(f"No {error} any more: say so on the page.")


def compare(theirs: Any, ours: Any, options: dict[str, str], page: Path) -> None:
    """Compare two results, relative to the largest of their values."""
    a, b = as_tensor(theirs), as_tensor(ours)
    bound = float(options.get("rtol", ROUNDING))
    if a.shape != b.shape:
        raise AssertionError(f"{page}: shapes {tuple(a.shape)} and {tuple(b.shape)}.")
    gap = ((a - b).abs().max() / a.abs().max()).item()
    print(f"{page.name}: {tuple(a.shape)}, apart by {gap:.1e} (at most {bound:g})")
    if not gap <= bound:
        raise AssertionError(f"{page}: {theirs} and {ours} are apart by {gap:.1e}.")


def as_tensor(value: Any) -> torch.Tensor:
    """Numbers, tensors, and lists of either, as one tensor in double."""
    if isinstance(value, list | tuple):
        return torch.stack([as_tensor(one) for one in value])
    return torch.as_tensor(getattr(value, "value", value)).detach().double().cpu()


def main(pages: list[str]) -> None:
    """Run all pages; each must have something to compare."""
    warnings.simplefilter("ignore")
    for page in pages:
        if not run(Path(page)):
            raise AssertionError(f"{page}: nothing to compare.")


if __name__ == "__main__":
    main(sys.argv[1:])
