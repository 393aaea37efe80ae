"""Real data sets from the files that are on this machine; nothing is downloaded."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "NAMES",
    "DataNotFound",
    "Dataset",
    "Split",
    "first_of",
    "load",
    "prepared",
    "read_idx",
    "split",
]

NAMES = ("fashion-mnist", "mnist", "cifar10", "digits")
# Where the Debian package dataset-fashion-mnist puts its files.
DEBIAN = Path("/usr/share/datasets")
_IDX_FOLDERS = {
    "fashion-mnist": ("fashion-mnist", "fashion_mnist", "FashionMNIST/raw", "fmnist"),
    "mnist": ("mnist", "MNIST/raw", "MNIST"),
}
_CIFAR_FOLDER = "cifar-10-batches-py"
_IDX_DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


class DataNotFound(LookupError):
    """The files of a data set are in none of the folders looked in."""


@dataclass(frozen=True)
class Dataset:
    """Images [samples, channels, height, width] in uint8 or float, labels [samples]."""

    name: str
    images: Tensor
    labels: Tensor
    source: str


@dataclass(frozen=True)
class Split:
    """Normalised training and validation data."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]


def load(name: str = "auto") -> Dataset:
    """The training set `name`; "auto" is Fashion-MNIST, or digits if it is not found.

    Looked in, in this order: the folder that FASTMINIMA_DATA names, ./data and ~/data
    (each may hold torchvision's layout), and the Debian package's folder.

    Raises:
        DataNotFound: with the folders that were looked in.
        ValueError: for an unknown name, or files that are damaged.
    """
    if name == "auto":
        try:
            return load("fashion-mnist")
        except DataNotFound:
            return load("digits")
    if name == "digits":
        return _load_digits()
    if name == "cifar10":
        return _load_cifar10()
    if name in _IDX_FOLDERS:
        return _load_idx(name)
    raise ValueError(f"No data set {name!r}; there are {('auto', *NAMES)}.")


def first_of(names: tuple[str, ...]) -> str:
    """The first of some data sets whose files are found.

    Raises:
        DataNotFound: if none is.
    """
    for name in names[:-1]:
        try:
            return load(name).name
        except DataNotFound:
            continue
    return load(names[-1]).name


@cache
def prepared(
    name: str,
    train_size: int,
    validation_size: int,
    seed: int = 777,
    *,
    pool: int = 1,
    skip: int = 0,
) -> Split:
    """`split` of the data set of that name, read once in a process; not to change."""
    return split(load(name), train_size, validation_size, seed, pool=pool, skip=skip)


def split(
    data: Dataset,
    train_size: int,
    validation_size: int,
    seed: int = 777,
    *,
    pool: int = 1,
    skip: int = 0,
) -> Split:
    """Random training and validation samples, less the pixel means, over one deviation.

    Mean per pixel and standard deviation over all pixels are those of the training
    samples.

    Args:
        data: as loaded.
        train_size, validation_size: samples of each.
        seed: of the order that they are taken from.
        pool: images are averaged over squares of this many pixels a side.
        skip: leave out this many samples of the order of seed 777, where earlier
            experiments took theirs.

    Raises:
        ValueError: if there are not that many samples.
    """
    count = len(data.labels)
    if train_size < 1 or train_size + validation_size > count - skip:
        raise ValueError(
            f"{data.name} has {count - skip} samples, not the {train_size} to "
            f"train with and {validation_size} to validate that were asked for."
        )
    order = np.random.RandomState(seed).permutation(count)
    if skip:
        seen = np.random.RandomState(777).permutation(count)[:skip]
        order = order[~np.isin(order, seen)]
    train, validation = order[:train_size], order[train_size:][:validation_size]
    images = data.images.float()
    if pool > 1:
        images = torch.nn.functional.avg_pool2d(images, pool)
    mean = images[train].mean(dim=0)
    deviation = (images[train] - mean).square().mean().sqrt()

    def part(index: np.ndarray) -> tuple[Tensor, Tensor]:
        return (images[index] - mean) / deviation, data.labels[index]

    return Split(part(train), part(validation))


def read_idx(path: Path) -> np.ndarray:
    """The array in an idx file, gzipped or not (the format of MNIST).

    Raises:
        ValueError: if the file is not one, or is cut short.
    """
    try:
        with _open(path) as file:
            content = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, str(error)) from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _IDX_DTYPES:
        raise _damaged(path, f"it starts with {content[:4]!r}, not an idx header")
    axes, start = content[3], 4 + 4 * content[3]
    if len(content) < start:
        raise _damaged(path, f"its header has {len(content)} bytes, not {start}")
    shape = struct.unpack(f">{axes}I", content[4:start])
    dtype = np.dtype(_IDX_DTYPES[content[2]])
    want = int(np.prod(shape)) * dtype.itemsize
    if len(content) - start != want:
        raise _damaged(path, f"{len(content) - start} bytes of data, not {want}")
    return np.frombuffer(content, dtype, offset=start).reshape(shape)


def _load_digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1)  # pyright: ignore[reportAttributeAccessIssue]
    return Dataset("digits", images, torch.from_numpy(digits.target), "scikit-learn")  # pyright: ignore[reportAttributeAccessIssue]


def _load_idx(name: str) -> Dataset:
    for folder in _folders(name):
        paths = [
            _with_gz(folder / f"train-{kind}-ubyte")
            for kind in ("images-idx3", "labels-idx1")
        ]
        if all(p is not None for p in paths):
            images, labels = (read_idx(p) for p in paths)  # pyright: ignore[reportArgumentType]
            if images.ndim != 3 or labels.shape != images.shape[:1]:
                raise ValueError(
                    f"{folder} has images of shape {images.shape} and labels of shape "
                    f"{labels.shape}. They are not of one data set; get them again."
                )
            return Dataset(
                name,
                torch.from_numpy(images.copy()).unsqueeze(1),
                torch.from_numpy(labels.astype(np.int64)),
                str(folder),
            )
    raise _not_found(name, "train-images-idx3-ubyte(.gz)", _folders(name))


def _load_cifar10() -> Dataset:
    folders = [root / _CIFAR_FOLDER for root in _roots()]
    folders += [root for root in _roots() if root.name == _CIFAR_FOLDER]
    for folder in folders:
        paths = [folder / f"data_batch_{i}" for i in range(1, 6)]
        if not all(p.is_file() for p in paths):
            continue
        batches = [_read_batch(p) for p in paths]
        images = np.concatenate([b[b"data"] for b in batches]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([b[b"labels"] for b in batches]).astype(np.int64)
        return Dataset(
            "cifar10", torch.from_numpy(images), torch.from_numpy(labels), str(folder)
        )
    raise _not_found("cifar10", "data_batch_1 … data_batch_5", folders)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays only, so that a data file cannot run code."""

    allowed = frozenset({"_reconstruct", "ndarray", "dtype", "encode", "scalar"})

    def find_class(self, module: str, name: str) -> object:
        if name in self.allowed and module.split(".")[0] in {"numpy", "_codecs"}:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of an array")


def _read_batch(path: Path) -> dict[bytes, np.ndarray]:
    try:
        with path.open("rb") as file:
            return _ArrayUnpickler(file, encoding="bytes").load()
    except (EOFError, pickle.UnpicklingError) as error:
        raise _damaged(path, str(error)) from error


def _roots() -> list[Path]:
    named = os.environ.get("FASTMINIMA_DATA")
    roots = [Path(named).expanduser()] if named else []
    return [*roots, Path("data"), Path.home() / "data", DEBIAN]


def _folders(name: str) -> list[Path]:
    """Folders that may hold the idx files, the one FASTMINIMA_DATA names included."""
    return list(_candidate_folders(name))


def _candidate_folders(name: str) -> Iterator[Path]:
    for root in _roots():
        for sub in _IDX_FOLDERS[name]:
            yield root / sub
            if root.as_posix().lower().endswith("/" + sub.lower()):
                yield root


def _with_gz(path: Path) -> Path | None:
    zipped = path.with_name(path.name + ".gz")
    return next((p for p in (path, zipped) if p.is_file()), None)


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # pyright: ignore[reportReturnType]


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is damaged: {why}. Delete it and get it again.")


def _not_found(name: str, files: str, folders: list[Path]) -> DataNotFound:
    listed = "\n  ".join(str(f) for f in folders)
    return DataNotFound(
        f"{name} ({files}) is in none of these folders:\n  {listed}\n"
        "Set FASTMINIMA_DATA to the folder that holds one of them"
        + (
            ", or install the Debian package dataset-fashion-mnist."
            if name == "fashion-mnist"
            else "."
        )
    )
