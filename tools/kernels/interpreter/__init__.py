"""Run Triton kernels on CPU tensors in this process, and check what they do.

    with interpreting() as report:
        launcher(cpu_tensors)
    report.unique_load_bytes, report.dot_flops, report.per_launch

Triton chooses between compiler and interpreter by an environment variable, once for a
process. Here kernels are interpreted inside the block only, and compile outside it.
Beyond what the interpreter does:

* every active lane of a load, store or atomic must fall on an element of a tensor
  argument, and masked lanes of a load without `other=` hold NaN;
* two programs must not touch a byte that one writes, nor two lanes of one store;
* `tl.dot` is right for bfloat16 and cuts float32 to tf32 where it is told to; any other
  bfloat16 arithmetic is refused, where the interpreter computes on raw bits;
* bytes requested, distinct bytes and operations of `tl.dot` are counted;
* programs run in either order, or only a sample of them.
"""

from tools.kernels.interpreter.memory import CheckError
from tools.kernels.interpreter.patch import interpreting
from tools.kernels.interpreter.report import Launch, Report

__all__ = ["CheckError", "Launch", "Report", "interpreting"]
