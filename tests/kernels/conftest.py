"""Nothing about Triton is collected where it is not installed."""

import importlib.util

collect_ignore_glob = []
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob.append("test_triton_*.py")
