"""What two processes check together; `test_distributed.py` launches this with torchrun.

Each rank takes its share of one batch, and what comes out is compared with the probe of
one process on the whole batch and with the float64 oracle. A check that fails says so
in the file `<folder>/<rank>.json`, and the next one runs.
"""

import datetime
import importlib
import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))
from setting import CHECKS

for module in (
    *("replicated", "replicated_faults", "sharded", "sharded_faults", "fused_mode"),
    "compiled",
):
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
