"""Starts two processes with torchrun that write down what became of their checks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import fastminima as fm

SECONDS = 240  # takes 25
ROOT = Path(fm.__file__).parents[1]


def two_processes(worker, folder, *names):
    """What each rank says of each check, and what the processes printed.

    The file `worker` is run with the folder and the names of checks, and each rank
    writes `<folder>/<rank>.json`.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(worker), str(folder), *names]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks too
        output, _ = process.communicate()
        output += f"\nstopped after {SECONDS} seconds"
    files = [Path(folder) / f"{rank}.json" for rank in range(2)]
    return [json.loads(f.read_text()) if f.exists() else {} for f in files], output
