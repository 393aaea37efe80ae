"""Squared norms of each parameter's gradients, as they come."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["NormTable", "Norms", "Squares", "new_numbers"]


@dataclass(frozen=True)
class NormTable:
    """Rows that a program fills: one a parameter, in the order of the model.

    Attributes:
        values: `[parameters, batch]`.
        rows: the place of each parameter.
    """

    values: Tensor
    rows: Mapping[str, int]


@dataclass
class Norms(MutableMapping[str, Tensor]):
    """`[batch]` for each parameter: rows of a table, or tensors of their own.

    Attributes:
        table: None where no program runs.
        filled: the parameters whose rows are filled.
    """

    table: NormTable | None = None
    filled: Collection[str] = ()
    _apart: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, parameter: str) -> Tensor:
        if parameter in self._apart:
            return self._apart[parameter]
        if self.table is None or parameter not in self.filled:
            raise KeyError(parameter)
        return self.table.values[self.table.rows[parameter]]

    def __setitem__(self, parameter: str, norms: Tensor) -> None:
        self._apart[parameter] = norms

    def __delitem__(self, parameter: str) -> None:
        del self._apart[parameter]

    def __iter__(self) -> Iterator[str]:
        yield from self._apart
        yield from (name for name in self.filled if name not in self._apart)

    def __len__(self) -> int:
        if not self._apart:
            return len(self.filled)
        return len(self._apart.keys() | self.filled)

    def total(self, order: Iterable[str]) -> Tensor:
        """The sum over parameters, `[batch]`, added up in the order of the model."""
        table = self.table
        if table is None or not self._fits(table):
            return torch.stack([self[name] for name in order if name in self]).sum(0)
        for name, norms in self._apart.items():
            table.values[table.rows[name]] = norms
        if len(self) == len(table.rows):
            return table.values.sum(0)
        there = sorted(table.rows[name] for name in self)
        return torch.stack([table.values[row] for row in there]).sum(0)

    def rows(self, order: Iterable[str]) -> tuple[list[str], Tensor]:
        """Names in the order of the model, and their norms, `[names, batch]`."""
        names = [name for name in order if name in self]
        table = self.table
        if table is not None and not self._apart:
            places = [table.rows[name] for name in names]
            if places == list(range(len(table.values))):
                return names, table.values
        return names, torch.stack([self[name] for name in names])

    def _fits(self, table: NormTable) -> bool:
        """Whether what stands apart can be put into its rows."""
        values = table.values
        return all(
            name in table.rows
            and norms.dtype == values.dtype
            and norms.device == values.device
            for name, norms in self._apart.items()
        )


class Squares:
    """A number for each of some parameters: tensors of several of them, as they came.

    Of a name that came twice the last one counts.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._values: list[Tensor] = []

    def add(self, names: Iterable[str], values: Tensor) -> None:
        """Note numbers `[names]`."""
        self._names += names
        self._values.append(values)

    def rows(self, order: Iterable[str]) -> tuple[list[str], Tensor]:
        """Names in the order of the model, and their numbers, `[names]`."""
        places = {name: place for place, name in enumerate(self._names)}
        names = [name for name in order if name in places]
        if not names:  # where ranks join without the mean nothing was read
            return [], torch.zeros(0, dtype=torch.float64, device="cpu")
        wanted = [places[name] for name in names]
        if len(self._values) == 1 and wanted == list(range(len(self._names))):
            return names, self._values[0]
        values = torch.cat(self._values)
        if values.device.type == "cpu":
            return names, values[wanted]
        numbers = values.unbind()  # places would be copied to the device
        return names, torch.stack([numbers[place] for place in wanted])


def new_numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory on the host; statistics are made of it when inference mode is over."""
    if not torch.is_inference_mode_enabled():
        return torch.empty(shape, dtype=dtype, device="cpu")
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device="cpu")
