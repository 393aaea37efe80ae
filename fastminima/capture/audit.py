"""Check a probe against plain autograd, parameter by parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import CaptureError
from .graph.passes import run_pass
from .graph.saved import frames_of
from .reading import mixing as batch_norms
from .reading.reader import Reading
from .session.timed import TimedCollector, TimedSession, stop_watch

__all__ = ["Audit", "AuditRow", "audit_losses"]

# A wrong row or rule is off by tenths; these allow for rounding in the model's dtype.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_HALF_TOLERANCE = 5e-2
# A gradient counts as zero below this part (of norms) of what it is compared with: the
# whole gradient, or the parameter's gradients of all samples. A bias before a
# normalisation has nothing but rounding for a gradient.
_NEGLIGIBLE = 1e-4
_TIMED = 3  # passes of each kind; what else the machine does only makes one slower


@dataclass(frozen=True)
class AuditRow:
    """One parameter: what covers it, and how far it is from plain autograd.

    Attributes:
        parameter: its name.
        rules: the autograd nodes that use it, or "universal" where there is no rule.
        sum_error: |sum_n g_n - grad| / |grad|.
        norm_error: worst relative difference of |g_n|^2 over the samples tried; None
            where single-sample gradients are not defined (`batchnorm="rows"`).
        tolerance: what both may be at most.
        cost: time that its norms took, as a part of the plain backward pass. Small ones
            are mostly the calls themselves, and vary from run to run.
    """

    parameter: str
    rules: tuple[str, ...]
    sum_error: float
    norm_error: float | None
    tolerance: float
    cost: float

    @property
    def ok(self) -> bool:
        """Whether both errors are within rounding (NaN is not)."""
        errors = [self.sum_error] + (
            [] if self.norm_error is None else [self.norm_error]
        )
        return all(error <= self.tolerance for error in errors)


@dataclass(frozen=True, repr=False)
class Audit:
    """The result of `GradientProbe.audit`; prints as a table."""

    rows: tuple[AuditRow, ...]
    unreached: tuple[str, ...]
    samples: tuple[int, ...]

    @property
    def ok(self) -> bool:
        """Whether every parameter agrees with plain autograd."""
        return all(row.ok for row in self.rows)

    @property
    def cost(self) -> float:
        """Time of all norms, as a part of the plain backward pass."""
        return sum(row.cost for row in self.rows)

    def to_dict(self) -> dict[str, list[Any]]:
        """Columns of a table with a row a parameter: `pandas.DataFrame(...)`."""
        columns: dict[str, list[Any]] = {
            "parameter": [row.parameter for row in self.rows],
            "rule": [", ".join(dict.fromkeys(row.rules)) for row in self.rows],
        }
        for name in ("sum_error", "norm_error", "tolerance", "cost", "ok"):
            columns[name] = [getattr(row, name) for row in self.rows]
        return columns

    def __repr__(self) -> str:
        return str(self)  # where a notebook shows the last value, the table is wanted

    def __str__(self) -> str:
        table = [("parameter", "rule", "sum error", "norm error", "cost", "")]
        for row in self.rows:
            norm = "-" if row.norm_error is None else f"{row.norm_error:.1e}"
            rules = ", ".join(dict.fromkeys(row.rules))
            verdict = "ok" if row.ok else "WRONG"
            errors = f"{row.sum_error:.1e}", norm
            table.append((row.parameter, rules, *errors, f"{row.cost:.1%}", verdict))
        widths = [max(len(line[i]) for line in table) for i in range(6)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))
            for line in table
        ]
        lines += [f"{name}: not reached by the loss" for name in self.unreached]
        wrong = sum(not row.ok for row in self.rows)
        verdict = "all agree" if self.ok else f"{wrong} WRONG"
        lines.append(
            f"{len(self.rows)} parameters, samples {list(self.samples)}: {verdict}; "
            f"norms cost {_percent(self.cost)} of the plain backward pass"
        )
        return "\n".join(line.rstrip() for line in lines)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "under 1%"


def audit_losses(
    new_session: Callable[[], TimedSession],
    losses: Tensor,
    parameters: Mapping[str, Tensor],
    *,
    samples: int,
    seed: int,
    reading: Reading,
    batchnorm: str,
) -> Audit:
    """Compare what a session collects on `losses` with autograd's own gradients."""
    names = list(reading.tape.leaves)
    if not names:
        raise CaptureError(
            "An audit differentiates through torch.autograd.grad, and all parameters "
            "of this loss are inside regions that do not allow it: use "
            "use_reentrant=False, or audit the uncompiled module."
        )
    tensors = [parameters[name] for name in names]
    count = len(losses)
    frames = frames_of(reading.tape.nodes)
    handles: list[Any] = []
    if reading.mixing and batchnorm == "frozen":
        handles = batch_norms.freeze(reading.tape, reading.mixing)
    try:
        grads, plain = _plain_pass(losses, tensors, frames)
        seen = _observed_pass(losses, tensors, new_session(), frames)
        for _ in range(_TIMED - 1):
            again = _observed_pass(losses, tensors, new_session(), frames).seconds
            for name, seconds in again.items():
                seen.seconds[name] = min(seconds, seen.seconds[name])
        whole = _norm(grads)
        generator = torch.Generator("cpu").manual_seed(seed)
        order = torch.randperm(count, generator=generator, device="cpu")
        chosen = order[:samples].sort().values
        norm_errors: dict[str, float | None] = dict.fromkeys(names)
        if not (reading.mixing and batchnorm == "rows"):
            for n in chosen.tolist():
                singles = run_pass(losses[n], tensors, None, frames=frames)
                _compare_sample(seen, n, count, names, singles, norm_errors)
    finally:
        for handle in handles:
            handle.remove()
    rows = []
    tolerance = _tolerance(reading)
    for name, grad in zip(names, grads, strict=True):
        if grad is None and name not in seen.totals:
            continue
        rows.append(
            AuditRow(
                name,
                tuple(seen.rules.get(name, ())),
                _sum_error(seen, name, grad, whole),
                norm_errors[name],
                tolerance,
                seen.seconds.get(name, 0.0) / plain,
            )
        )
    unreached = tuple(name for name in parameters if name not in reading.tape.leaves)
    return Audit(tuple(rows), unreached, tuple(chosen.tolist()))


def _plain_pass(
    losses: Tensor, tensors: list[Tensor], frames: list[Any]
) -> tuple[tuple[Tensor | None, ...], float]:
    """The gradients, and the seconds of the fastest of some passes."""
    fastest = math.inf
    grads: tuple[Tensor | None, ...] = ()
    now = stop_watch([losses.device, *(t.device for t in tensors)])
    for _ in range(_TIMED):
        started = now()
        grads = run_pass(losses.mean(), tensors, None, frames=frames)
        fastest = min(fastest, now() - started)
    return grads, fastest


def _observed_pass(
    losses: Tensor, tensors: list[Tensor], session: TimedSession, frames: list[Any]
) -> TimedCollector:
    try:
        run_pass(losses.mean(), tensors, session.owner, frames=frames)
        session.finish()
        return session.collector
    finally:
        session.close()


def _tolerance(reading: Reading) -> float:
    """That of the narrowest floating-point dtype the graph computes in."""
    dtypes = {m.dtype for node in reading.tape.nodes for m in node._input_metadata}
    narrowest = min(
        (d for d in dtypes if d.is_floating_point), key=lambda d: torch.finfo(d).bits
    )
    return _TOLERANCE.get(narrowest, _HALF_TOLERANCE)


def _sum_error(
    seen: TimedCollector, name: str, grad: Tensor | None, whole: float
) -> float:
    total = seen.totals.get(name)
    if total is None or grad is None:
        return math.inf
    grad = grad.to_dense() if grad.is_sparse else grad
    error = (total.double() - grad.double()).norm().item()
    scale = max(grad.double().norm().item(), _NEGLIGIBLE * whole)
    return error / scale if scale > 0 else error


def _norm(grads: Iterable[Tensor | None]) -> float:
    dense = [g.to_dense() if g.is_sparse else g for g in grads if g is not None]
    return math.sqrt(sum(g.double().square().sum().item() for g in dense))


def _compare_sample(
    seen: TimedCollector,
    n: int,
    count: int,
    names: list[str],
    grads: Sequence[Tensor | None],
    errors: dict[str, float | None],
) -> None:
    whole = _norm(grads)
    for name, grad in zip(names, grads, strict=True):
        if name not in seen.collected.sq_norms:
            continue
        norms = seen.collected.sq_norms[name].double() * count**2
        want = 0.0
        if grad is not None:
            grad = grad.to_dense() if grad.is_sparse else grad
            want = grad.double().square().sum().item()
        floor = _NEGLIGIBLE**2 * max(norms.mean().item(), whole**2)
        difference = abs(norms[n].item() - want)
        error = difference / max(want, floor) if max(want, floor) > 0 else difference
        sofar = errors[name]
        is_worse = sofar is None or not error <= sofar
        errors[name] = error if is_worse else sofar
