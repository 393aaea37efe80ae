"""What `data` means: one batch, or any other re-iterable of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

__all__ = ["Batches", "tensors_in"]

Count = Callable[[Any], int]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)


def _is_batch(data: Any) -> bool:
    if isinstance(data, (Tensor, Mapping)):
        return True
    return isinstance(data, (tuple, list)) and any(isinstance(x, Tensor) for x in data)


class Batches:
    """The batches in `data`, each with its weight: the number of its samples.

    A tensor, a mapping, and a tuple or list that holds tensors are one batch, as a
    DataLoader yields it. Anything else that can be iterated more than once is its
    batches. A batch weighs the leading size of its first tensor, or `count(batch)`.

    Raises:
        ValueError: `data` is an iterator (used up by its first pass), a map-style
            Dataset, not iterable, or empty.
    """

    def __init__(self, data: Any, count: Count | None = None) -> None:
        self.is_single = _is_batch(data)
        self._data: Iterable[Any] = [data] if self.is_single else _re_iterable(data)
        self._count = count

    @property
    def single(self) -> Any:
        """The batch, where there is one only."""
        return next(iter(self._data))

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        is_empty = True
        for batch in self._data:
            weight = self.weight(batch)
            if weight > 0:
                is_empty = False
                yield batch, weight
        if is_empty:
            raise ValueError(
                f"The data hold no samples: {type(self._data).__name__} gave no batch "
                "with at least one. Pass a batch, or a re-iterable of batches."
            )

    def weight(self, batch: Any) -> int:
        """Number of samples in a batch."""
        if self._count is not None:
            weight = self._count(batch)
            if weight < 0:
                raise ValueError(f"count(batch) must not be negative, got {weight}.")
            return weight
        first = next(tensors_in(batch), None)
        if first is None or first.dim() == 0:
            met = "no tensor" if first is None else "a first tensor without dimensions"
            raise ValueError(
                f"Cannot count the samples of a batch of type {type(batch).__name__} "
                f"with {met}. Pass count=, a function from a batch to the number of "
                "its samples."
            )
        return first.shape[0]


def _re_iterable(data: Any) -> Iterable[Any]:
    name = type(data).__name__
    if isinstance(data, Iterator):
        raise ValueError(
            f"The data are a one-shot iterator ({name}): a second product would see "
            "none of them. Pass list(data), a DataLoader, or one batch."
        )
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise ValueError(
            f"The data are a Dataset ({name}), whose items are samples, not batches. "
            "Pass a DataLoader over it."
        )
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise ValueError(
            f"The data are neither a batch nor iterable: {name}. Pass [batch] with "
            "count=, a function from a batch to its number of samples."
        )
    length = getattr(data, "__len__", None)
    if length is not None and length() == 0:
        raise ValueError(f"The data are empty: {name} of length 0. Pass some batches.")
    return data
