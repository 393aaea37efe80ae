"""The loop of a worker: claim a task, run it, record it, until none is left."""

from __future__ import annotations

import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .folder import Claim, Folder, sweeps
from .provenance import provenance

__all__ = ["end_with_parent", "work"]

# A task that took this many workers with it is recorded as failed.
MOST_LOST = 3
# Seconds between two looks at tasks that others are at.
WAIT = 1.0
# Seconds between two checkpoints of a task.
CHECKPOINT = 60.0


def work(roots: Sequence[Path], *, time_limit: float = math.inf) -> int:
    """Do tasks of the sweeps in `roots` until all are finished; returns how many.

    Waits while other workers are at the last ones, to take over what they lose. A
    task that raises is recorded as failed, with its message, and the rest goes on.

    Args:
        roots: folders, each of a sweep or of several.
        time_limit: seconds for one task; what takes longer is recorded as failed, and
            this process ends (a stuck kernel cannot be stopped otherwise).

    Raises:
        ValueError: if there is no sweep.
    """
    import torch

    torch.set_num_threads(1)
    folders = [folder for root in roots for folder in sweeps(root)]
    if not folders:
        raise ValueError(
            f"No sweep.json in {', '.join(map(str, roots))}, nor in a folder there."
        )
    count = 0
    while True:
        claimed, is_over = _next(folders)
        if claimed is not None:
            _do(claimed, time_limit)
            count += 1
        elif is_over:
            return count
        else:
            time.sleep(WAIT)


def _next(folders: list[Folder]) -> tuple[Claim | None, bool]:
    """A task for this process, or None and whether everything is finished."""
    is_over = True
    for folder in folders:
        done = folder.finished()
        for key in folder.tasks:
            if key in done:
                continue
            is_over = False
            claim = folder.claim(key)
            if claim is not None:
                return claim, False
    return None, is_over


def _do(claim: Claim, time_limit: float) -> None:
    folder = claim.folder
    started = time.monotonic(), time.process_time()

    def stop_if_late() -> None:
        if time.monotonic() - started[0] > time_limit:
            _record(claim, [], started, f"took longer than {time_limit:g} s")
            os._exit(3)

    _current[:] = [claim]
    with claim.kept_up(stop_if_late):
        if claim.number >= MOST_LOST and _lost(claim) >= MOST_LOST:
            _record(claim, [], started, f"{MOST_LOST} workers were lost at it")
            return
        try:
            rows = folder.experiment.run(
                folder.settings, folder.tasks[claim.key], _Watch(claim)
            )
        except Exception as error:  # whatever an experiment raises: recorded, shown
            traceback.print_exc()
            message = f"{type(error).__name__}: {error}"
            _record(claim, [], started, message)
        else:
            _record(claim, rows, started)


def _lost(claim: Claim) -> int:
    """How many earlier workers were at this task and never came back."""
    folder = claim.folder.path / "claims"
    earlier = [folder / f"{claim.key}.{n}" for n in range(claim.number)]
    # A released claim, whose worker went on, is dated 0.
    return sum(path.exists() and path.stat().st_mtime > 0 for path in earlier)


def _record(
    claim: Claim,
    rows: list[dict[str, Any]],
    started: tuple[float, float],
    message: str = "",
) -> None:
    """Write the record, unless another worker has taken the task over.

    `started` is when the task was, by the clock and in processor time.
    """
    if not claim.is_mine():
        return
    folder = claim.folder
    folder.append(
        {
            "task": claim.key,
            "experiment": folder.experiment.id,
            "preset": folder.settings.preset,
            "dataset": folder.settings.dataset,
            "settings": folder.settings.fingerprint,
            "config": folder.tasks[claim.key],
            "status": "failed" if message else "finished",
            "message": message,
            "rows": _finite(rows),
            "seconds": round(time.monotonic() - started[0], 2),
            "processor_seconds": round(time.process_time() - started[1], 2),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "code": folder.code,
            "protocol": getattr(folder.settings, "protocol", ""),
            **provenance(),
        }
    )
    folder.checkpoint(claim.key).unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """The same with None for what JSON has no number for, floats to 7 digits."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


@dataclass
class _Watch:
    """See `experiment.Watch`."""

    claim: Claim
    saved: float = field(default_factory=time.monotonic)

    def progress(self, fraction: float) -> None:
        self.claim.fraction = min(1.0, fraction)

    def load(self) -> Any:
        import torch

        path = self.claim.folder.checkpoint(self.claim.key)
        if not path.exists():
            return None
        return torch.load(path, weights_only=False)

    def save(self, state: Callable[[], Any]) -> None:
        import torch

        if time.monotonic() - self.saved < CHECKPOINT or not self.claim.is_mine():
            return
        self.saved = time.monotonic()
        path = self.claim.folder.checkpoint(self.claim.key)
        part = path.with_name(f".{path.name}-{os.getpid()}")
        torch.save(state(), part)
        part.replace(path)


_current: list[Claim] = []


def end_with_parent() -> None:
    """End this process when its standard input closes, as a killed parent's does.

    The task it is at is left to others at once: it was not what ended this process.
    """

    def wait() -> None:
        while os.read(0, 1024):  # not through sys.stdin, whose lock outlives the thread
            pass
        for claim in _current:
            claim.release()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
