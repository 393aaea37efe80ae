"""One sweep on disk: what is to be run, who runs what, and what came out.

    FOLDER/sweep.json            experiment, settings, tasks; written once
    FOLDER/claims/TASK.N         the N-th worker that took up this task
    FOLDER/records/WORKER.jsonl  one line a finished task; a file a worker
    FOLDER/checkpoints/TASK.pt   where a long task had got to

Any number of workers on any number of machines that share the folder may work on it.
A claim is made by linking a file that does not exist, which one worker can do; a
claim that is no longer kept up is taken over by creating the next number, so that no
file is ever removed that somebody may be looking at.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.common import records

from .experiment import Experiment, Settings, Task, load
from .provenance import code_hash

__all__ = ["Claim", "Folder", "State", "key_of", "sweeps"]

# A claim not kept up for this many seconds is stale, unless its process is seen alive.
STALE = 300.0
# Seconds between two signs of life.
HEARTBEAT = 2.0


def key_of(settings: Settings, task: Task) -> str:
    """The name of a task: a hash of the settings and of itself."""
    text = json.dumps([settings.fingerprint, task], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sweeps(root: Path) -> list[Folder]:
    """The sweep in a folder, or all those below it.

    One that cannot be read, of an experiment that is gone, is named and left out.
    """
    if (root / "sweep.json").exists():
        return [Folder(root)]
    found = []
    for path in sorted(root.glob("*/sweep.json")):
        try:
            found.append(Folder(path.parent))
        except (ValueError, ImportError) as error:
            print(f"{path.parent}: left out: {error}", file=sys.stderr)
    return found


@dataclass(frozen=True)
class State:
    """How far a sweep is: finished tasks, and shares of those that are running."""

    tasks: int
    finished: int
    failed: int
    running: dict[str, float]

    @property
    def done(self) -> float:
        """Tasks done, parts of running ones included."""
        return self.finished + sum(self.running.values())


@dataclass
class Folder:
    """A sweep on disk. What it is was written once; what came out is read anew.

    Attributes:
        path: the folder.
        experiment, settings: what is run.
        tasks: by their keys.
        code: hash of the code that makes the records now.
    """

    path: Path
    experiment: Experiment = field(init=False)
    settings: Settings = field(init=False)
    tasks: dict[str, Task] = field(init=False)
    code: str = field(init=False)
    _seen: dict[Path, tuple[int, list[dict[str, Any]]]] = field(
        default_factory=dict, repr=False
    )

    def __post_init__(self) -> None:
        with (self.path / "sweep.json").open() as file:
            spec = json.load(file)
        self.experiment = load(spec["experiment"])
        # At once, while the files are those that were imported.
        self.code = code_hash(self.experiment.run)
        self.settings = settings_of(
            self.experiment, spec["preset"], spec["dataset"], spec["overrides"]
        )
        self.tasks = {
            key_of(self.settings, task): task
            for task in self.experiment.tasks(self.settings)
        }

    @classmethod
    def create(
        cls,
        path: Path,
        name: str,
        preset: str,
        dataset: str,
        overrides: dict[str, Any] | None = None,
    ) -> Folder:
        """Make a sweep, or open the same one.

        Raises:
            ValueError: if the folder holds another sweep.
        """
        spec = {
            "experiment": name,
            "preset": preset,
            "dataset": dataset,
            "overrides": overrides or {},
        }
        file = path / "sweep.json"
        settings_of(load(name), preset, dataset, spec["overrides"])
        for part in ("claims", "records", "checkpoints"):
            (path / part).mkdir(parents=True, exist_ok=True)
        if not file.exists():
            _write_whole(file, json.dumps(spec, indent=1))
        found = json.loads(file.read_text())
        grown = {k: v for k, v in found["overrides"].items() if k != "seeds"}
        wanted = {k: v for k, v in spec["overrides"].items() if k != "seeds"}
        if {**found, "overrides": grown} != {**spec, "overrides": wanted}:
            raise ValueError(
                f"{path} holds another sweep: {found}, not {spec}. Name another "
                "folder with --out."
            )
        if found != spec:  # the same experiment with other seeds
            _write_whole(file, json.dumps(spec, indent=1))
        return cls(path)

    def read(self) -> list[dict[str, Any]]:
        """The records, whoever made them, of whatever task and code, oldest first."""
        found: list[dict[str, Any]] = []
        for path in sorted((self.path / "records").glob("*.jsonl")):
            size, seen = self._seen.get(path, (0, []))
            if path.stat().st_size != size:  # files only grow
                size = path.stat().st_size
                seen = records.read(path)
                self._seen[path] = size, seen
            found += seen
        return sorted(found, key=lambda record: record.get("time", ""))

    def finished(self) -> dict[str, dict[str, Any]]:
        """The first record of each task of this sweep made by the present code."""
        found: dict[str, dict[str, Any]] = {}
        for record in self.read():
            key = record.get("task")
            if key in self.tasks and record.get("code") == self.code:
                found.setdefault(key, record)
        return found

    def outdated(self) -> int:
        """How many records of tasks of this sweep were made by other code."""
        return sum(
            r.get("task") in self.tasks and r.get("code") != self.code
            for r in self.read()
        )

    def rows(self) -> list[dict[str, Any]]:
        """The rows of all finished tasks, in the order of the tasks."""
        done = self.finished()
        return [
            row
            for key in self.tasks
            if key in done and done[key]["status"] == "finished"
            for row in done[key]["rows"]
        ]

    def state(self) -> State:
        """How far the sweep is."""
        done = self.finished()
        now = self._now()
        running = {}
        for key in self.tasks.keys() - done.keys():
            latest = self._latest(key)
            if latest is not None and not _is_stale(latest, now):
                running[key] = float(_content(latest).get("fraction", 0.0))
        failed = sum(r["status"] == "failed" for r in done.values())
        return State(len(self.tasks), len(done), failed, running)

    def claim(self, key: str) -> Claim | None:
        """Take up a task; None if somebody is at it or has done it."""
        latest, now = self._latest(key), self._now()
        if latest is not None and not _is_stale(latest, now):
            return None
        number = 0 if latest is None else int(latest.suffix[1:]) + 1
        path = self.path / "claims" / f"{key}.{number}"
        # Linked and not written there: whoever is killed leaves a whole claim or none.
        part = self.path / "claims" / f".{uuid.uuid4().hex}"
        part.write_text(json.dumps(_me()))
        try:
            path.hardlink_to(part)
        except FileExistsError:
            return None
        finally:
            part.unlink()
        claim = Claim(self, key, path, number)
        if key in self.finished():  # between the look and the claim
            claim.release()
            return None
        return claim

    def append(self, record: dict[str, Any]) -> None:
        """Add a record to this worker's file; it is on disk when this returns."""
        records.append(self.path / "records" / f"{WORKER}.jsonl", record)

    def checkpoint(self, key: str) -> Path:
        """The file in which a task keeps how far it is."""
        return self.path / "checkpoints" / f"{key}-{self.code}.pt"

    def _latest(self, key: str) -> Path | None:
        found = list((self.path / "claims").glob(f"{key}.*"))
        return max(found, key=lambda path: int(path.suffix[1:]), default=None)

    def _now(self) -> float:
        """The time by the clock that dates the files, perhaps of another machine."""
        path = self.path / "claims" / f".clock-{WORKER}"
        path.write_text("")
        return path.stat().st_mtime


@dataclass
class Claim:
    """A task taken up by this process, kept up by a thread until released.

    Attributes:
        number: how many workers had taken it up before.
    """

    folder: Folder
    key: str
    path: Path
    number: int
    fraction: float = 0.0
    _over: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def kept_up(self, on_beat: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Give signs of life until the block ends, then release."""

        def beat() -> None:
            while not self._over.wait(HEARTBEAT):
                self._write()
                on_beat()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
            self.release()

    def is_mine(self) -> bool:
        """Whether nobody has taken the task over."""
        return self.folder._latest(self.key) == self.path

    def release(self) -> None:
        """Leave it to whoever wants it, if it is not finished."""
        os.utime(self.path, (0, 0))

    def _write(self) -> None:
        with self._lock:
            if not self._over.is_set():
                _write_whole(
                    self.path, json.dumps({**_me(), "fraction": self.fraction})
                )


def settings_of(
    experiment: Experiment, preset: str, dataset: str, overrides: dict[str, Any]
) -> Settings:
    """The settings of a preset, some of its fields replaced.

    Raises:
        ValueError: for a field that the experiment's settings do not have, or a value
            of another kind.
    """
    import dataclasses

    settings = experiment.settings(preset, dataset)
    unknown = overrides.keys() - {f.name for f in dataclasses.fields(settings)}
    if unknown:
        fields = ", ".join(f.name for f in dataclasses.fields(settings))
        raise ValueError(
            f"{experiment.id} has no setting {', '.join(sorted(unknown))}; it has "
            f"{fields}."
        )
    values = {name: _as_tuples(value) for name, value in overrides.items()}
    for name, value in values.items():
        _check_kind(name, getattr(settings, name), value)
    return dataclasses.replace(settings, **values)


def _check_kind(name: str, usual: Any, value: Any) -> None:
    """A number for a number, a list for a list, a text for a text."""
    kinds = ((bool,), (int, float), (str,), (tuple,))
    wanted = next((k for k in kinds if isinstance(usual, k)), (object,))
    if not isinstance(value, wanted) or (
        isinstance(value, bool) and not isinstance(usual, bool)
    ):
        raise ValueError(
            f"{name} is {json.dumps(usual)} by default, got {value!r}. Values are "
            "written in JSON: 0.1, [1, 2] or [[0.1, 32]], true, and text as it is."
        )


def _as_tuples(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_as_tuples(v) for v in value)
    return value


def _write_whole(path: Path, text: str) -> None:
    """Write a file that is seen whole or not at all."""
    part = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    part.write_text(text)
    part.replace(path)


def _content(path: Path) -> dict[str, Any]:
    """What a claim says; nothing while it is being written."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_stale(path: Path, now: float) -> bool:
    """Whether nobody is at a claimed task any more."""
    try:
        age = now - path.stat().st_mtime
    except FileNotFoundError:
        return True
    if age > STALE:
        return True
    owner = _content(path)
    return owner.get("machine") == MACHINE and not _is_alive(owner)


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether the process of a claim made on this machine still runs."""
    return owner.get("started") == _started(int(owner["pid"]))


def _started(pid: int) -> str | None:
    """Something that tells a process from a later one with the same number."""
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if stat[0] in "ZX" else stat[19]
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"


def _machine() -> str:
    """Tells apart machines, reboots and containers, which number their processes."""
    parts = [platform.node() or socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256(":".join(parts).encode()).hexdigest()[:16]


def _me() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "worker": WORKER,
        "machine": MACHINE,
        "pid": pid,
        "started": _started(pid),
        "since": time.time(),
    }


MACHINE = _machine()
WORKER = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"
