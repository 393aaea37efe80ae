"""`fastminima audit`: a user's model and loss, compared with plain autograd."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from dataclasses import asdict
from typing import Any

from ..capture import Audit, CaptureError, GradientProbe
from ..curvature import CurvatureAudit, Hessian
from .target import Target, load_target
from .usage import UsageError

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    """Print the tables; 1 where something is wrong."""
    if options.samples < 1:
        raise UsageError(f"--samples must be at least 1, got {options.samples}.")
    target = load_target(options.target)
    parts = [options.only] if options.only else ["gradients", "curvature"]
    found: dict[str, Audit | CurvatureAudit | str] = {}
    with contextlib.redirect_stdout(sys.stderr):  # what a loss prints is no result
        if "gradients" in parts:
            found["gradients"] = _gradients(target, options)
        if "curvature" in parts:
            found["curvature"] = _curvature(target)
    is_ok = all(not isinstance(f, str) and f.ok for f in found.values())
    if options.json:
        made = {name: _to_dict(one) for name, one in found.items()}
        print(json.dumps({"ok": is_ok, **made}, indent=1))
    else:
        print("\n\n".join(f"{name}\n{_text(one)}" for name, one in found.items()))
    return 0 if is_ok else 1


def _gradients(target: Target, options: argparse.Namespace) -> Audit | str:
    """The probe's audit, or why there is none."""
    losses = target.losses()
    if losses.dim() != 1:
        return (
            f"The loss has shape {tuple(losses.shape)}, and per-sample gradients are "
            "those of the vector of per-sample losses: return it (reduction='none'), "
            "or ask for --only curvature."
        )
    probe = GradientProbe(target.model, batchnorm=options.batchnorm)
    try:
        return probe.audit(losses, samples=options.samples)
    except CaptureError as error:
        return str(error)


def _curvature(target: Target) -> CurvatureAudit | str:
    try:
        return Hessian(target.model, target.mean, target.batch).audit()
    except ValueError as error:
        return str(error)


def _text(one: Audit | CurvatureAudit | str) -> str:
    return f"REFUSED: {one}" if isinstance(one, str) else str(one)


def _to_dict(one: Audit | CurvatureAudit | str) -> dict[str, Any]:
    if isinstance(one, str):
        return {"ok": False, "refused": one}
    if isinstance(one, Audit):
        rows = [_plain(asdict(row)) | {"ok": row.ok} for row in one.rows]
        listed = {"unreached": list(one.unreached), "samples": list(one.samples)}
        return {"ok": one.ok, "rows": rows, "cost": one.cost, **listed}
    checks = [_plain(asdict(check)) | {"ok": check.ok} for check in one.checks]
    return {"ok": one.ok, "operator": one.operator, "checks": checks}


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """With None for what JSON has no number for."""
    return {
        name: None if isinstance(x, float) and not math.isfinite(x) else x
        for name, x in fields.items()
    }
