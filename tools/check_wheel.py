"""What must hold where a wheel was installed: imports, compiled kernels, right numbers.

usage: python tools/check_wheel.py [--no-kernels]
"""

import sys
from pathlib import Path

import torch

import fastminima as fm
from fastminima import _native


def main() -> None:
    needs_kernels = "--no-kernels" not in sys.argv
    if needs_kernels and _native.missing_reason is not None:
        sys.exit(f"no kernels in this wheel: {_native.missing_reason}")
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv1d(3, 8, 3), torch.nn.Tanh(), torch.nn.Linear(10, 4)
    )
    x = torch.randn(6, 3, 12)

    def loss(model, batch):
        return model(batch).square().mean()

    def losses():
        return model(x).square().mean((1, 2))

    parameters = list(model.parameters())
    singles = [
        torch.autograd.grad(one, parameters, retain_graph=True) for one in losses()
    ]
    want = torch.stack([sum(g.square().sum() for g in grads) for grads in singles])
    stats = fm.GradientProbe(model).backward(losses())
    torch.testing.assert_close(stats.sq_norms, want)
    pairs = fm.top_eigenpairs(fm.Hessian(model, loss, x))
    assert pairs.converged, pairs
    kernels = "" if _native.missing_reason else f" ({_native.available_isas()[0]})"
    print(f"fastminima {fm.__version__} from {Path(fm.__file__).parent}{kernels}")
    print(f"  torch {torch.__version__}, python {sys.version.split()[0]}; {stats}")


main()
