"""What a type checker makes of the package; also runs. See test_typing.py."""

from typing import assert_type

import torch

import fastminima as fm
from fastminima.typing import TraceMethod, Which

Sure = fm.GradientStatistics
Maybe = fm.GradientStatistics | None

model = torch.nn.Linear(2, 2)
losses = model(torch.ones(3, 2)).sum(1)
steps = 3

assert_type(fm.GradientProbe(model).backward(losses), Sure)
assert_type(fm.GradientProbe(model, "gram", every=1), fm.GradientProbe[Sure])
assert_type(fm.GradientProbe(model, every=steps), fm.GradientProbe[Maybe])
assert_type(fm.GradientProbe(model, accumulate=steps), fm.GradientProbe[Maybe])
assert_type(fm.GradientProbe(model, accumulate=None).end_step(), Maybe)


def noise_of(probe: fm.GradientProbe) -> torch.Tensor:
    return probe.backward(model(torch.ones(3, 2)).sum(1)).noise_scale


def noise_now_and_then(probe: fm.GradientProbe[Maybe]) -> torch.Tensor | None:
    stats = probe.backward(model(torch.ones(3, 2)).sum(1))
    return None if stats is None else stats.noise_scale


assert_type(noise_of(fm.GradientProbe(model)), torch.Tensor)
noise_now_and_then(fm.GradientProbe(model, every=2))
noise_now_and_then(fm.GradientProbe(model))

pairs = fm.top_eigenpairs(torch.eye(3), which="smallest")
assert_type(pairs, fm.Eigenpairs)
assert_type(float(fm.trace(torch.eye(3), method="hutchinson")), float)


def extreme(which: Which = "largest", method: TraceMethod = "xtrace") -> float:
    H = torch.eye(3)
    top = fm.top_eigenpairs(H, which=which).values[0]
    return float(top / fm.trace(H, method=method).value)


extreme("smallest")
