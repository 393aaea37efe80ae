"""What the workers of two processes have in common: checks by name, and their runs."""

import datetime
import gc
import json
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def raised(call, kind, *words):
    """That `call` raises on this rank."""
    try:
        call()
    except kind as error:
        for word in words:
            assert word in str(error), str(error)
        return error
    raise AssertionError(f"no {kind.__name__}")


def run(folder, names):
    """Runs checks, `every` being all there are; what became of each is in a file."""
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    results = {}
    path = Path(folder) / f"{dist.get_rank()}.json"
    wanted = [n for name in names for n in (CHECKS if name == "every" else [name])]
    for name in wanted:
        try:
            CHECKS[name]()
            results[name] = "ok"
        except Exception:  # every kind of failure is to be shown, with its check
            results[name] = traceback.format_exc()
        path.write_text(json.dumps(results))
    dist.destroy_process_group()
