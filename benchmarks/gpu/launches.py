"""How many operators and kernels a step starts.

The profiler tells both where the device lets it (it needs CUPTI for kernels). Where it
saw none, a CUDA graph of the step has one node for each launch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["started"]

_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemsetAsync", "cudaMemcpyAsync")


def started(step: Callable[[], object], device: str) -> dict:
    """`operators` of PyTorch; `launches` of a GPU, None on a CPU; and how counted."""
    found = _by_profiler(step, device)
    if device == "cpu" or found["launches"]:
        return found
    try:
        return found | {"launches": _by_graph(step), "how": "nodes of a CUDA graph"}
    except (AttributeError, OSError, RuntimeError, TypeError) as error:
        said = f"no kernels seen; of a graph: {type(error).__name__}: {error}"
        return found | {"launches": None, "how": said[:300]}


def _by_profiler(step: Callable[[], object], device: str) -> dict:
    activities = [ProfilerActivity.CPU]
    if device != "cpu":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as seen:
        step()
        if device != "cpu":
            torch.cuda.synchronize()
    names = [event.name for event in seen.events()]
    launches = sum(name.startswith(_LAUNCHES) for name in names)
    return {
        "operators": sum(name.startswith("aten::") for name in names),
        "launches": None if device == "cpu" else launches,
        "how": "profiler",
    }


def _by_graph(step: Callable[[], object]) -> int:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        step()
    count = ctypes.c_size_t()
    status = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(
        ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count)
    )
    if status:
        raise RuntimeError(f"cuGraphGetNodes returned {status}")
    return count.value
