"""Curvature operators: matrices over the parameters, known by their products.

Public: `hessian`, `gauss_newton`, `covariance`, `loss_hessian` (of a training step,
with `recording`), `derived` (made of others), `preconditioner`, `critical` (by losses
alone), `audit`.

What the others are for, from below:

    numbers     _scale, _same, _trust, _finite: norms at any scale, bits, what rounding
                may do, what is not finite
    evaluation  _random, _guard, _rewrites, _attention, _recorded_hooks, _replicas:
                a closure is run so that it changes nothing and has two derivatives
    graph       _graph, _nodes, _explained, _functions: what was recorded, and lacks
    data        _data, _weights, _reads, _state: batches, their weights, what is read
    engines     _engines, _evaluated, rop/: ways to make a product
    ranks       _ranks, _shards, _joint, _joint_loss: of all processes' data
    operators   _matrix, _recorder, _checks, _operator, _mean, _compared: what they all
                have
    audits      _auditing, _audit_closures, _audit_graph, _audit_lines, _audit_loss,
                _audit_products, _differences, _kinks
"""

from ._finite import NotFiniteError
from ._matrix import FlatMatrix
from ._operator import CurvatureOperator
from ._trust import Noise, Suspicion, SymmetryWatch
from .audit import CurvatureAudit, CurvatureCheck
from .covariance import GradientCovariance
from .critical import CriticalSharpness, critical_sharpness
from .derived import DerivedOperator
from .gauss_newton import GaussNewton
from .hessian import Hessian
from .loss_hessian import LossHessian
from .preconditioner import divisors, momenta, preconditioner
from .recording import twice_differentiable

__all__ = [
    "CriticalSharpness",
    "CurvatureAudit",
    "CurvatureCheck",
    "CurvatureOperator",
    "DerivedOperator",
    "FlatMatrix",
    "GaussNewton",
    "GradientCovariance",
    "Hessian",
    "LossHessian",
    "Noise",
    "NotFiniteError",
    "Suspicion",
    "SymmetryWatch",
    "critical_sharpness",
    "divisors",
    "momenta",
    "preconditioner",
    "twice_differentiable",
]
