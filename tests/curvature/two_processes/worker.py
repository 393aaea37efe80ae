"""What two processes check together; `test_two_processes.py` launches this.

Each rank has its share of a batch, and what comes out is compared with one process that
has all of it. A check that fails says so in the file `<folder>/<rank>.json`, and the
next one runs.
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from rank_checks import run

for module in ("joint", "joint_faults", "engines_and_steps", "fully_sharded"):
    importlib.import_module(module)  # which adds to the checks

if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
