"""What is true, computed slowly in float64 from the definition; and who agrees.

Nothing here uses the package or a peer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import Verdict
from benchmarks.workloads import Workload

__all__ = ["Truth", "judge", "sample_truth"]

# A ReLU or a max pooling whose inputs lie within rounding of each other may decide
# another way in float32 than in float64. That moves one sample: its squared norm by up
# to 1e-3, a parameter's mean gradient by up to 4e-3 (seen on W3 and W4 over six seeds,
# with plain PyTorch). Norms of nearly all samples must be much closer.
WORST = 5e-3
MEDIAN = 1e-4


@dataclass(frozen=True)
class Truth:
    """Float64 statistics of the per-sample gradients of one workload."""

    sq_norms: dict[str, Tensor]  # [batch] of each parameter
    second_moments: dict[str, Tensor]  # mean over samples of the squared gradient
    gradient: dict[str, Tensor]  # mean over samples of the gradient

    @property
    def norms(self) -> Tensor:
        """`[batch]`: squared norms of the samples' whole gradients."""
        return torch.stack(list(self.sq_norms.values())).sum(dim=0)

    def of(self, names: Iterable[str]) -> Truth:
        """What is true when only these parameters require a gradient."""
        parts = self.sq_norms, self.second_moments, self.gradient
        wanted = list(names)
        return Truth(*({name: part[name] for name in wanted} for part in parts))


def sample_truth(workload: Workload) -> Truth:
    """One backward pass a sample, each alone in its batch, in float64."""
    exact = workload.double()
    parameters = exact.parameters
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    squares = {name: torch.zeros_like(p) for name, p in parameters.items()}
    sq_norms: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for n in range(exact.batch_size):
        one = Workload(
            exact.name, exact.model, exact.inputs[n : n + 1], exact.targets[n : n + 1]
        )
        grads = torch.autograd.grad(one.losses().sum(), list(parameters.values()))
        for name, g in zip(parameters, grads, strict=True):
            sq_norms[name].append(g.square().sum())
            sums[name] += g
            squares[name].addcmul_(g, g)
    count = exact.batch_size
    return Truth(
        {name: torch.stack(norms) for name, norms in sq_norms.items()},
        {name: s.div_(count) for name, s in squares.items()},
        {name: s.div_(count) for name, s in sums.items()},
    )


def judge(answer, gradient: dict[str, Tensor], truth: Truth) -> Verdict:
    """Compares a step's statistic, and the gradient it left behind, with the truth.

    Args:
        answer: `[batch]` squared norms, second moments by parameter name, or None
            for a step that measures nothing.
        gradient: what the step left in `.grad`, by parameter name.
        truth: the float64 answer.
    """
    left = _by_parameter(gradient, truth.gradient)
    if not left.max() <= WORST:
        return Verdict(False, left.max().item(), ".grad")
    if answer is None:
        return Verdict(True, left.max().item(), ".grad")
    if isinstance(answer, dict):
        worst = _by_parameter(answer, truth.second_moments).max().item()
        return Verdict(worst <= WORST, worst, "second moments")
    norms = truth.norms
    if answer.shape != norms.shape:
        return Verdict(False, float("inf"), f"shape {tuple(answer.shape)}")
    errors = (answer.double() - norms).abs() / norms
    # `<=` so that NaN is wrong.
    ok = bool(errors.max() <= WORST) and bool(errors.median() <= MEDIAN)
    return Verdict(ok, errors.max().item(), "squared norms")


def _by_parameter(answer: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    """Relative error of each parameter's tensor; below 1e-6 of the whole, of that."""
    if answer.keys() != truth.keys():
        return torch.tensor([float("inf")])
    whole = sum(t.square().sum() for t in truth.values()).sqrt()
    return torch.stack(
        [
            (answer[name].double() - t).norm() / t.norm().clamp(min=1e-6 * whole)
            for name, t in truth.items()
        ]
    )
