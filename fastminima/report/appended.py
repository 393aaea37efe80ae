"""Files of JSON lines, read while something else is still writing them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["AppendedLines"]

_START = '{"step"'


class AppendedLines:
    """The objects of a file of JSON lines, each once, as they are appended.

    What is cut off is never an error: the end of a line that is still being written is
    left for the next call, and of two rows in one line, where a process was killed
    inside the first, the second is taken.

    Attributes:
        skipped: lines that could not be read so far.

    Example:
        >>> import tempfile, pathlib
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = pathlib.Path(folder.name) / "rows.jsonl"
        >>> lines = AppendedLines(path)
        >>> lines.read()
        []
        >>> _ = path.write_text('{"step": 0, "loss": 2.5}' + chr(10) + '{"step": 1, "l')
        >>> lines.read()
        [{'step': 0, 'loss': 2.5}]
        >>> folder.cleanup()
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.skipped = 0
        self._offset = 0

    def shrank(self) -> bool:
        """Whether the file is shorter than what was read: it was written anew."""
        return self._size() < self._offset

    def read(self) -> list[dict[str, Any]]:
        """Objects of the complete lines since the last call; none without a file."""
        if self._size() <= self._offset:
            return []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            complete = file.read()
        complete = complete[: complete.rfind(b"\n") + 1]
        self._offset += len(complete)
        found = []
        for line in complete.decode("utf-8", "replace").splitlines():
            if line.strip():
                value = _object(line)
                if value is None:
                    self.skipped += 1
                else:
                    found.append(value)
        return found

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return 0


def _object(line: str) -> dict[str, Any] | None:
    """The object in a line, or the last one that begins in it; None if neither is."""
    for text in (line, line[max(line.rfind(_START), 0) :]):
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            return value
    return None
