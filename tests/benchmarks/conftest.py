"""Makes the repository's `benchmarks` importable wherever pytest was started.

By its path and nothing else: the repository's root on `sys.path` would put the source
tree before an installed fastminima.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"

if "benchmarks" not in sys.modules:
    spec = spec_from_file_location(
        "benchmarks",
        FOLDER / "__init__.py",
        submodule_search_locations=[str(FOLDER)],
    )
    sys.modules["benchmarks"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["benchmarks"])
