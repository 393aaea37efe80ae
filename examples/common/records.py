"""Results as JSON lines that survive an interruption at any moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["append", "read"]


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one line, on disk when this returns; processes may append at the same time.

    The line goes out in a single write to a file opened for appending. A torn line
    that an interruption left before it is closed first, so that it spoils only itself.

    Raises:
        ValueError: for a number that JSON does not have (NaN, infinity).
    """
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(file).st_size
        os.lseek(file, max(0, size - 1), os.SEEK_SET)
        if size and os.read(file, 1) != b"\n":
            line = b"\n" + line
        written = os.write(file, line)
        if written != len(line):
            raise OSError(f"{path}: wrote {written} of {len(line)} bytes. Disk full?")
        os.fsync(file)
    finally:
        os.close(file)


def read(path: Path) -> list[dict[str, Any]]:
    """All whole records, in order; a torn line is left out, a missing file is empty."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # torn by an interruption, and its run is not in the list
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
