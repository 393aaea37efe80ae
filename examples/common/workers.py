"""A pool of worker processes that end with their parent, however it ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, resource_tracker
from typing import Any

__all__ = ["run"]

Report = Callable[[Any], None]


def run(
    work: Callable[[Any, Report], None], tasks: Sequence[Any], workers: int
) -> Iterator[Any]:
    """Do `work(task, report)` for each task, yielding whatever it reports, as it does.

    Each worker is a fresh process that computes with one thread. A killed parent, even
    by SIGKILL, takes its workers with it; so does leaving the loop early.

    Raises:
        RuntimeError: when a worker dies, or `work` raises there (which it prints).
    """
    # Read by the OpenMP runtime when a worker loads it.
    os.environ.update({"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"})
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(tasks))
    processes: dict[connection.Connection, Any] = {}
    try:
        for _ in range(min(workers, len(tasks))):
            with _interrupts_wait():
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_worker, args=(work, theirs), daemon=True
                )
                process.start()
                theirs.close()
                processes[ours] = process
        while processes:
            for pipe in connection.wait(list(processes)):
                yield from _serve(pipe, processes, waiting)
    finally:
        for process in processes.values():
            process.kill()
            process.join()


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C waits for the end of the block; processes started there never hear it.

    They inherit that the signal is blocked. That alone would not keep it from this
    process: any other thread may receive it (tqdm has one), and Python raises it in
    this one then, between the start of a worker and the words that it waits for.
    """
    if threading.current_thread() is not threading.main_thread():
        with _blocked():
            yield  # Ctrl-C is never raised here
        return
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        with _blocked():
            yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Starts the helper of multiprocessing, which unblocks what it has blocked.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Any, processes: dict[Any, Any], waiting: list[Any]) -> Iterator[Any]:
    """Handle one message of one worker: a report, or that it is ready for a task."""
    try:
        kind, value = pipe.recv()
    except (EOFError, ConnectionError):
        process = processes[pipe]
        process.join()
        raise RuntimeError(
            f"A worker ended with exit code {process.exitcode} in the middle of a "
            "task; what it printed says why."
        ) from None
    if kind == "report":
        yield value
    elif waiting:
        pipe.send(waiting.pop())
    else:
        pipe.send(None)
        processes.pop(pipe).join()


def _worker(work: Callable[[Any, Report], None], pipe: Any) -> None:
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        pipe.send(("ready", None))
        task = pipe.recv()
        if task is None:
            return
        work(task, lambda value: pipe.send(("report", value)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # returns when the parent is gone
        os._exit(1)
