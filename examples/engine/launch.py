"""Starts workers here, on SLURM or on Ray, and shows how far they are."""

from __future__ import annotations

import builtins
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from .folder import Folder

__all__ = ["Workers", "cluster", "local", "watch_until_done"]

ROOT = Path(__file__).resolve().parents[2]
# A worker lost more often than this for each task ends the sweep.
LOSSES = 3


class Workers(Protocol):
    """Workers that were started together."""

    def replace_lost(self) -> None:
        """Start others for those that ended although work is left.

        Raises:
            RuntimeError: when that happens again and again.
        """
        ...

    def stop(self) -> None:
        """End those that still run."""
        ...


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def local(
    roots: Sequence[Path], count: int, arguments: Sequence[str] = ()
) -> Iterator[Workers]:
    """Worker processes of one thread on this machine, which end with this one."""
    workers = _Processes(roots, count, arguments)
    try:
        yield workers
    finally:
        workers.stop()


@contextlib.contextmanager
def cluster(
    where: str, roots: Sequence[Path], count: int, options: dict[str, Any] | None = None
) -> Iterator[Workers]:
    """Workers on a cluster: "slurm", "submitit-local", "ray" or "ray:ADDRESS".

    Args:
        where: which cluster.
        roots: folders of the sweeps, which every machine sees under the same names.
        count: how many workers.
        options: for SLURM, parameters of submitit such as {"slurm_partition": "gpu"}.

    Raises:
        ImportError: without the extra `fastminima[cluster]`.
        ValueError: for another name.
    """
    kind, _, address = where.partition(":")
    if kind in ("slurm", "submitit-local"):
        workers: Workers = _Submitit(kind, roots, count, options or {})
    elif kind == "ray":
        workers = _Ray(address, roots, count)
    else:
        raise ValueError(f"No cluster {where!r}: slurm, submitit-local, ray[:ADDRESS].")
    try:
        yield workers
    finally:
        workers.stop()


def watch_until_done(
    folders: Sequence[Folder],
    workers: Workers,
    *,
    quiet: bool = False,
    patience: float = 0.5,
) -> None:
    """A progress bar with the time left, until every task has its record."""
    from tqdm import tqdm

    total = sum(len(folder.tasks) for folder in folders)
    layout = "{l_bar}{bar}| {n:.1f}/{total} tasks [{elapsed}<{remaining}{postfix}]"
    with tqdm(total=total, bar_format=layout, disable=quiet, smoothing=0.05) as bar:
        start = sum(folder.state().done for folder in folders)
        bar.initial = bar.n = start
        while True:
            states = [folder.state() for folder in folders]
            bar.n = max(bar.n, min(total, sum(state.done for state in states)))
            failed = sum(state.failed for state in states)
            running = sum(len(state.running) for state in states)
            words = f", {running} running" + (f", {failed} failed" if failed else "")
            bar.set_postfix_str(words[2:], refresh=True)
            if all(state.finished == state.tasks for state in states):
                return
            workers.replace_lost()
            time.sleep(patience)


class _Processes:
    """Processes on this machine."""

    def __init__(
        self, roots: Sequence[Path], count: int, arguments: Sequence[str]
    ) -> None:
        self.command = [sys.executable, "-m", "examples", "worker", *map(str, roots)]
        self.command += ["--with-parent", *arguments]
        self.started = 0
        self.most = count * (1 + LOSSES) + 8
        self.running = [self._start() for _ in range(count)]

    def replace_lost(self) -> None:
        for at, process in enumerate(self.running):
            if process.poll() not in (None, 0):
                if self.started >= self.most:
                    raise RuntimeError(
                        f"Workers ended again and again, the last with exit code "
                        f"{process.returncode}; what they printed says why."
                    )
                self.running[at] = self._start()

    def stop(self) -> None:
        for process in self.running:
            if process.stdin is not None:
                process.stdin.close()  # asks it to end, leaving its task to others
        for process in self.running:
            try:
                process.wait(timeout=3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        self.started += 1
        return subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,  # closes when this process ends, however it does
            stdout=sys.stderr.fileno() if _has_file(sys.stderr) else None,
            start_new_session=True,  # Ctrl-C is for this process, which stops them
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "OMP_WAIT_POLICY": "PASSIVE",
                "PYTHONPATH": _paths(),
            },
        )


def _paths() -> str:
    """Where a worker finds `examples`, and what this process finds."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(path for path in paths if path)


def _has_file(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError):
        return False
    return True


def _worker(roots: Sequence[str]) -> int:
    """What a cluster runs."""
    from .worker import work

    return work([Path(root) for root in roots])


class _Submitit:
    """Jobs of SLURM, or of submitit's executor on this machine."""

    def __init__(
        self, kind: str, roots: Sequence[Path], count: int, options: dict[str, Any]
    ) -> None:
        submitit = _import("submitit")
        self.roots, self.left = [str(r) for r in roots], count * (1 + LOSSES)
        name = "slurm" if kind == "slurm" else "local"
        self.executor = submitit.AutoExecutor(folder=roots[0] / "jobs", cluster=name)
        given = {"timeout_min": 24 * 60, "cpus_per_task": 1, "name": "fastminima"}
        self.executor.update_parameters(**{**given, **options})
        self.jobs = [self._submit() for _ in range(count)]

    def replace_lost(self) -> None:
        for at, job in enumerate(self.jobs):
            if not job.done() or job.exception() is None:
                continue
            if self.left <= 0:
                raise RuntimeError(f"Jobs failed again and again: {job.exception()}")
            self.left -= 1
            self.jobs[at] = self._submit()

    def stop(self) -> None:
        for job in self.jobs:
            if not job.done():
                job.cancel()

    def _submit(self) -> Any:
        return self.executor.submit(_worker, self.roots)


class _Ray:
    """Tasks of Ray; it starts lost ones again by itself, and so do we."""

    def __init__(self, address: str, roots: Sequence[Path], count: int) -> None:
        self.ray = _import("ray")
        self.roots, self.left = [str(r) for r in roots], count * (1 + LOSSES)
        self.is_ours = not self.ray.is_initialized()
        self.print = builtins.print  # Ray puts its own in place of it
        if self.is_ours:
            self.ray.init(
                address=address or None,
                include_dashboard=False,
                log_to_driver=False,
                runtime_env={"env_vars": {"PYTHONPATH": _paths()}},
                **({} if address else {"num_cpus": count}),
            )
        remote = self.ray.remote(num_cpus=1, max_retries=LOSSES)
        self.function: Callable[..., Any] = remote(_worker).remote
        self.jobs = [self.function(self.roots) for _ in range(count)]

    def replace_lost(self) -> None:
        for at, job in enumerate(self.jobs):
            ready, _ = self.ray.wait([job], timeout=0)
            if not ready:
                continue
            try:
                self.ray.get(job)
            except self.ray.exceptions.RayError as error:
                if self.left <= 0:
                    raise RuntimeError("Workers were lost again and again") from error
                self.left -= 1
                self.jobs[at] = self.function(self.roots)

    def stop(self) -> None:
        for job in self.jobs:
            self.ray.cancel(job, force=True)
        if self.is_ours:
            self.ray.shutdown()
            builtins.print = self.print


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"--cluster needs {name}: pip install 'fastminima[cluster]'."
        ) from error
