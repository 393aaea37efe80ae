"""Operators whose products are made by tangents, and by double backward to compare."""

from __future__ import annotations

import abc
import copy
from typing import cast

from torch import Tensor

from ._mean import MeanOperator

__all__ = ["ComparedOperator"]


class ComparedOperator(MeanOperator):
    """Makes its first product in both ways; where they differ, by double backward.

    `_make` is to go by tangents where `_goes_by_tangents`.
    """

    _is_second = False  # whether a product is compared with the first

    @property
    @abc.abstractmethod
    def _is_by_tangents(self) -> bool:
        """Whether products are made by tangents, but for those that are compared."""

    @abc.abstractmethod
    def _give_up_tangents(self) -> None:
        """From here on by double backward."""

    @property
    def _goes_by_tangents(self) -> bool:
        return self._is_by_tangents and not self._is_second

    def _for_audit(self) -> ComparedOperator:
        twin = cast(ComparedOperator, super()._for_audit())
        twin._is_second = True  # by double backward, which tangents must agree with
        return twin

    def _quick(self) -> ComparedOperator | None:
        if not self._is_by_tangents:
            return None
        quick = copy.copy(self)
        quick._kept, quick._is_second = None, False
        return quick

    def _make_twice(self, columns: list[Tensor], products: list[Tensor]) -> None:
        """The second time by double backward, which tangents are compared with.

        Where the two are not the same, double backward has to be, and is used.
        """
        if not self._is_by_tangents:
            super()._make_twice(columns, products)
            return
        kept, self._is_second = self._kept, True
        try:
            super()._make_twice(columns, products)
            if kept is not None and self._kept is not None:
                self._kept.graph = kept.graph  # the other one has shown the same
        except ValueError:
            self._give_up_tangents()
            self._kept = None
            products[:] = self._multiply(columns)
            super()._make_twice(columns, products)
        finally:
            self._is_second = False
