"""Finds the loops of a kernel in its instructions."""

from __future__ import annotations

import re

from tools.kernels.sass import Instruction, count

__all__ = ["hot_loop", "loops"]

_TARGET = re.compile(r"\.L_[\w.]+")
# Loops that have none of these only wait or count.
_WORK = ("load.16", "load.8", "load.narrow", "async.16", "async.narrow", "bulk", "fp32")


def loops(body: list[Instruction]) -> list[list[Instruction]]:
    """The natural loops: of each jump back to a block that dominates it, the blocks."""
    blocks, follow = _flow(body)
    before = {b: {p for p in blocks if b in follow[p]} for b in blocks}
    over = _dominators(follow, before)
    found: dict[int, set[int]] = {}
    for last in over:
        for head in follow[last] & over[last]:
            found.setdefault(head, {head}).update(_reaching(last, head, before, over))
    return [
        [body[i] for b in sorted(loop) for i in range(b, blocks[b])]
        for loop in found.values()
    ]


def _flow(body: list[Instruction]) -> tuple[dict[int, int], dict[int, set[int]]]:
    """Basic blocks as {first: past the last}, and where each goes on."""
    places = {x.label: i for i, x in enumerate(body) if x.label}
    jumps = {i: j for i, x in enumerate(body) if (j := _jump(x, places)) is not None}
    starts = sorted({0, *places.values(), *(i + 1 for i in jumps if i + 1 < len(body))})
    blocks = dict(zip(starts, [*starts[1:], len(body)], strict=True))
    follow = {}
    for start, end in blocks.items():
        targets, falls = jumps.get(end - 1, (set(), True))
        follow[start] = targets | ({end} if falls and end < len(body) else set())
    return blocks, follow


def _jump(x: Instruction, places: dict[str, int]) -> tuple[set[int], bool] | None:
    """Where an instruction goes, and whether it can also go on; None: it goes on."""
    conditional = x.operands.startswith("@")
    if x.opcode.startswith(("BRA", "BRX", "JMP")):
        targets = {places[t] for t in _TARGET.findall(x.operands) if t in places}
        # The condition is an operand, or a property of the warp, in some forms.
        conditional |= ".DIV" in x.opcode or ".U.ANY" in x.opcode
        conditional |= bool(re.match(r"!?U?P\d", x.operands))
        return targets, conditional
    if x.opcode.split(".")[0] in ("EXIT", "RET") and not conditional:
        return set(), False
    return None


def _dominators(
    follow: dict[int, set[int]], before: dict[int, set[int]]
) -> dict[int, set[int]]:
    """Of each block that can be reached: the blocks on every way to it."""
    reached, waiting = {0}, [0]
    while waiting:
        new = follow[waiting.pop()] - reached
        reached |= new
        waiting.extend(new)
    over = {b: set(reached) for b in reached}
    over[0] = {0}
    changed = True
    while changed:
        changed = False
        for b in sorted(reached - {0}):
            ways = [over[p] for p in before[b] if p in reached]
            new = set.intersection(*ways) | {b}
            if new != over[b]:
                over[b], changed = new, True
    return over


def _reaching(
    last: int, head: int, before: dict[int, set[int]], reached: dict[int, set[int]]
) -> set[int]:
    """Blocks from which `last` can be reached without passing `head`."""
    found = {last}
    waiting = [] if last == head else [last]
    while waiting:
        new = {p for p in before[waiting.pop()] if p in reached} - found - {head}
        found |= new
        waiting.extend(new)
    return found


def hot_loop(body: list[Instruction]) -> list[Instruction]:
    """The innermost loop with most tensor-core work; without any, most other work."""
    inner = _innermost(loops(body))
    for kinds in (("tensor",), _WORK):
        work = [sum(count(loop)[kind] for kind in kinds) for loop in inner]
        if any(work):
            return inner[work.index(max(work))]
    return []


def _innermost(found: list[list[Instruction]]) -> list[list[Instruction]]:
    members = [{id(x) for x in loop} for loop in found]
    return [
        loop
        for loop, mine in zip(found, members, strict=True)
        if not any(other < mine for other in members)
    ]
