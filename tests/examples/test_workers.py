"""The pool of workers, interrupted where it hurts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Ctrl-C reaches every process of the group right after the start of a worker, and a
# thread that does not block it, as tqdm's.
INTERRUPTED = """
import os, signal, sys, threading, time
from multiprocessing import util
sys.path.insert(0, {root!r})
from examples.common import workers
honest = util.spawnv_passfds
def then_interrupted(*arguments):
    pid = honest(*arguments)
    if "spawn_main" in str(arguments):
        os.killpg(0, signal.SIGINT)
        time.sleep(0.2)
    return pid
def work(task, report):
    report(task)
if __name__ == "__main__":
    util.spawnv_passfds = then_interrupted
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    try:
        print(list(workers.run(work, [1, 2], 2)))
    except KeyboardInterrupt:
        print("interrupted")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="signals of a process group")
def test_an_interrupt_between_a_start_and_its_task(tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(INTERRUPTED.format(root=str(ROOT)))
    done = subprocess.run(
        [sys.executable, str(driver)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        timeout=120,
    )
    assert done.stdout == "interrupted\n"
