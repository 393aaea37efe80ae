"""Layer norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .leaves import Leaf, wanted
from .rule import Rule, Some, products

__all__ = ["LayerNorm"]


class LayerNorm(Rule):
    """y = n w + b with n = (x - mean) r, r one over the standard deviation.

    dn = P dx with P u = r (u - mean(u) - n mean(n u)), and the gradient by x is P h,
    h = w g. With m = mean(n h) and s = r mean(n dx), which is -dr / r:

        change = P (change of h - s h) - r (dn m + n mean(dn h))
    """

    remembers = True

    def __init__(self, node: Any, gradients: Some) -> None:
        super().__init__(node, gradients)
        g = gradients[0]
        assert g is not None
        self._x: Tensor = node._saved_input.detach()
        self._shape = list(node._saved_normalized_shape)
        self._dims = tuple(range(-len(self._shape), 0))
        self._mean, self._r = node._saved_result1, node._saved_result2
        weight = node._saved_weight
        self._w: Tensor | None = None if weight is None else weight.detach()
        self._has = [n is not None for n, _ in node.next_functions]
        self._g = g
        h = self._h()
        self._m = self._average(self._n() * h)
        self._kept: tuple[Tensor, Tensor] | None = None

    def tangents(self, inputs: Some) -> Some:
        """The tangents of the outputs."""
        dx, dw, db = inputs
        out, self._kept, n = None, None, self._n()
        if dx is not None:
            dn = self._project(dx)
            s = self._average(n * dx).mul_(self._r)
            self._kept = dn, s
            out = dn.clone() if self._w is None else dn * self._w
        if dw is not None:
            out = n * dw if out is None else out.addcmul_(n, dw)
        if db is not None:
            out = db.expand_as(self._x).clone() if out is None else out.add_(db)
        return [out]

    def changes(
        self, changes: Some, inputs: Some, leaves: Sequence[Leaf | None]
    ) -> Some:
        """The changes of the gradients by the inputs."""
        change, dw = changes[0], inputs[1]
        kept, self._kept = self._kept, None
        n = self._n()
        found: list[Tensor | None] = [None, None, None]
        of_x, of_w, of_bias = wanted(self._has, leaves)
        if of_x:
            found[0] = self._by_input(change, dw, kept, n)
        if of_w:
            terms = products((n, change), (self._g, None if kept is None else kept[0]))
            found[1] = None if terms is None else terms.sum_to_size(self._shape)
        if of_bias and change is not None:
            found[2] = change.sum_to_size(self._shape)
        return found

    def _by_input(
        self,
        change: Tensor | None,
        dw: Tensor | None,
        kept: tuple[Tensor, Tensor] | None,
        n: Tensor,
    ) -> Tensor | None:
        dh = change
        if change is not None and self._w is not None:
            dh = change * self._w
        if dw is not None:
            dh = self._g * dw if dh is None else dh.addcmul_(self._g, dw)
        if kept is None:
            return None if dh is None else self._project(dh)
        (dn, s), h = kept, self._h()
        dh = h * -s if dh is None else torch.addcmul(dh, h, s, value=-1)
        more = torch.addcmul(dn * self._m, n, self._average(h.mul_(dn)))
        return torch.addcmul(self._project(dh), more, self._r, value=-1)

    def _n(self) -> Tensor:
        return (self._x - self._mean).mul_(self._r)

    def _h(self) -> Tensor:
        return self._g.clone() if self._w is None else self._g * self._w

    def _average(self, t: Tensor) -> Tensor:
        return t.mean(self._dims, keepdim=True)

    def _project(self, t: Tensor) -> Tensor:
        return torch.ops.aten.native_layer_norm_backward(
            t.contiguous(),
            self._x,
            self._shape,
            self._mean,
            self._r,
            None,
            None,
            [True, False, False],
        )[0]
