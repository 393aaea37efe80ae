"""What two processes check together; `test_two_processes.py` launches this.

Each rank has its share of a batch, and what comes out is compared with one process that
has all of it. A check that fails says so in the file `<folder>/<rank>.json`, and the
next one runs.
"""

import datetime
import importlib
import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from sharing import CHECKS

for module in ("joint", "joint_faults", "engines_and_steps", "fully_sharded"):
    importlib.import_module(module)  # which adds to CHECKS


def main(folder, names):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    results = {}
    path = Path(folder) / f"{dist.get_rank()}.json"
    for name in names or CHECKS:
        try:
            CHECKS[name]()
            results[name] = "ok"
        except Exception:  # every kind of failure is to be shown, with its check
            results[name] = traceback.format_exc()
        path.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
