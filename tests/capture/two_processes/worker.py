"""What two processes check together; `test_distributed.py` launches this with torchrun.

Each rank takes its share of one batch, and what comes out is compared with the probe of
one process on the whole batch and with the float64 oracle. A check that fails says so
in the file `<folder>/<rank>.json`, and the next one runs.
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from rank_checks import run

for module in (
    *("replicated", "replicated_faults", "sharded", "sharded_faults", "fused_mode"),
    *("compiled", "watched", "watched_steps"),
):
    importlib.import_module(module)  # which adds to the checks

if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
