"""What `data` means: one batch, or any other re-iterable of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ._random import loader_generators

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
    batches. A batch weighs the leading size of its tensors, or `count(batch)`.

    Raises:
        ValueError: `data` is an iterator (used up by its first pass), a map-style
            Dataset, not iterable, or empty; there is no `count`, and the leading sizes
            of tensors disagree on how batches compare.
    """

    def __init__(self, data: Any, count: Count | None = None) -> None:
        self.is_single = _is_batch(data)
        self._data: Iterable[Any] = [data] if self.is_single else _re_iterable(data)
        self._count = count
        self._had_samples = False

    @classmethod
    def of_one(cls, batch: Any, weight: int) -> Batches:
        """One batch, whatever it is made of."""
        found = cls({}, lambda _: weight)
        found._data = [batch]
        return found

    @property
    def is_counted(self) -> bool:
        """Whether the user says what a batch weighs."""
        return self._count is not None

    @property
    def generators(self) -> list[torch.Generator]:
        """The generators that a DataLoader has of its own."""
        return loader_generators(self._data)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        is_empty, first = True, None
        for batch in self._data:
            weight = self.weight(batch)
            if weight > 0 and not self.is_single and not self.is_counted:
                first = first or self.sizes(batch)
                _check_sizes(first, self.sizes(batch))
            if weight > 0:
                is_empty, self._had_samples = False, True
                yield batch, weight
        if is_empty:
            name = type(self._data).__name__
            raise ValueError(
                f"The data gave samples in one pass and none in the next: {name} can "
                "be read only once. Pass list(data), a DataLoader, or one batch."
                if self._had_samples
                else f"The data hold no samples: {name} gave no batch with at least "
                "one. Pass a batch, or a re-iterable of batches."
            )

    def weight(self, batch: Any) -> int:
        """Number of samples in a batch."""
        if self._count is not None:
            weight = self._count(batch)
            if weight < 0:
                raise ValueError(f"count(batch) must not be negative, got {weight}.")
            return weight
        sizes = self.sizes(batch)
        if not sizes:
            raise ValueError(
                f"Cannot count the samples of a batch of type {type(batch).__name__} "
                "with no tensor that has a dimension. Pass count=, a function from a "
                "batch to the number of its samples."
            )
        return sizes[0]

    def sizes(self, batch: Any) -> list[int]:
        """Leading sizes of the tensors in a batch."""
        return [t.shape[0] for t in tensors_in(batch) if t.dim()]


def _check_sizes(first: list[int], sizes: list[int]) -> None:
    """ValueError unless all tensors say the same about how two batches compare."""
    is_same = len(first) == len(sizes) and all(
        a * sizes[0] == b * first[0] for a, b in zip(first, sizes, strict=True)
    )
    if not is_same and len(set(sizes)) > 1:
        raise ValueError(
            "The tensors of the batches disagree on their numbers of samples: leading "
            f"sizes {sizes} in one, {first} in the first. Pass count=, a function from "
            "a batch to its number of samples, such as lambda batch: batch[1].shape[0]."
        )


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
    if _length(data) == 0:
        raise ValueError(f"The data are empty: {name} of length 0. Pass some batches.")
    return data


def _length(data: Any) -> int | None:
    """The length, where there is one: not of a loader over an iterable without."""
    length = getattr(data, "__len__", None)
    try:
        return None if length is None else length()
    except (TypeError, NotImplementedError):
        return None
