"""Loading data sets from tiny files written here, in the usual layouts."""

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch

from examples.common import data


@pytest.fixture(autouse=True)
def _only_these_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FASTMINIMA_DATA", str(tmp_path / "named"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "debian")


def idx(array):
    code = {"uint8": 8, "int32": 12, "float32": 13}[array.dtype.name]
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def images_and_labels(count=7):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8)
    return images, (np.arange(count) % 10).astype(np.uint8)


def write(folder, *, zipped=False, count=7):
    folder.mkdir(parents=True)
    images, labels = images_and_labels(count)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        content = idx(array)
        path = folder / f"train-{name}-ubyte"
        if zipped:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
        else:
            path.write_bytes(content)
    return images, labels


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("fashion-mnist", "named/fashion-mnist"),
        ("fashion-mnist", "named/FashionMNIST/raw"),
        ("fashion-mnist", "data/FashionMNIST/raw"),
        ("fashion-mnist", "home/data/FashionMNIST/raw"),
        ("fashion-mnist", "debian/fashion-mnist"),
        ("mnist", "named/MNIST/raw"),
        ("mnist", "data/mnist"),
    ],
)
def test_finds_idx_files(tmp_path, name, folder, zipped):
    images, labels = write(tmp_path / folder, zipped=zipped)
    got = data.load(name)
    assert got.name == name
    assert got.images.shape == (7, 1, 28, 28)
    assert np.array_equal(got.images.squeeze(1).numpy(), images)
    assert got.labels.tolist() == labels.tolist()
    assert folder in got.source or got.source == folder


def test_the_named_folder_may_be_the_one_with_the_files(tmp_path, monkeypatch):
    write(tmp_path / "elsewhere" / "FashionMNIST" / "raw")
    inside = tmp_path / "elsewhere" / "FashionMNIST" / "raw"
    monkeypatch.setenv("FASTMINIMA_DATA", str(inside))
    assert data.load("fashion-mnist").source == str(inside)
    with pytest.raises(data.DataNotFound):
        data.load("mnist")  # the same file names, another data set


def test_the_named_folder_comes_first(tmp_path):
    write(tmp_path / "debian" / "fashion-mnist", count=3)
    write(tmp_path / "named" / "fashion-mnist", count=5)
    assert len(data.load("auto").labels) == 5


def test_auto_falls_back_to_digits():
    got = data.load("auto")
    assert (got.name, got.source) == ("digits", "scikit-learn")
    assert got.images.shape == (1797, 1, 8, 8)
    assert got.labels.dtype == torch.int64


def test_what_is_not_there_is_said_with_the_folders():
    with pytest.raises(
        data.DataNotFound, match=r"(?s)named/fashion-mnist.*debian.*dataset"
    ):
        data.load("fashion-mnist")
    with pytest.raises(data.DataNotFound, match=r"(?s)cifar-10-batches-py.*FASTMINIMA"):
        data.load("cifar10")
    with pytest.raises(ValueError, match="imagenet"):
        data.load("imagenet")


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32"])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4)])
def test_read_idx(tmp_path, dtype, shape):
    want = (np.arange(np.prod(shape)).reshape(shape) * 3).astype(dtype)
    (tmp_path / "file").write_bytes(idx(want))
    got = data.read_idx(tmp_path / "file")
    assert np.array_equal(got, want)


def test_damaged_idx_files(tmp_path):
    good = idx(images_and_labels()[0])
    for content in (good[:-1], good + b"x", good[:10], b"<html>", b"", b"\0\0\7\1"):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ValueError, match=r"file is damaged.*get it again"):
            data.read_idx(tmp_path / "file")
    zipped = gzip.compress(good)
    for content in (zipped[: len(zipped) // 2], b"not a zip", zipped[:20] + b"??"):
        (tmp_path / "file.gz").write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            data.read_idx(tmp_path / "file.gz")


def test_images_and_labels_must_agree(tmp_path):
    folder = tmp_path / "named" / "mnist"
    write(folder)
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(6, np.uint8)))
    with pytest.raises(ValueError, match="not of one data set"):
        data.load("mnist")


def write_cifar(folder, protocol=2):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (10, 3072)).astype(np.uint8)
    for i in range(5):
        part = slice(2 * i, 2 * i + 2)
        batch = {b"data": images[part], b"labels": [i, 9 - i], b"batch_label": b"x"}
        content = pickle.dumps(batch, protocol=protocol)
        (folder / f"data_batch_{i + 1}").write_bytes(content)
    return images


@pytest.mark.parametrize(
    "place", ["named/cifar-10-batches-py", "data/cifar-10-batches-py"]
)
def test_cifar10(tmp_path, place):
    images = write_cifar(tmp_path / place)
    got = data.load("cifar10")
    assert got.images.shape == (10, 3, 32, 32)
    assert np.array_equal(got.images[3].flatten().numpy(), images[3])
    assert got.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]


def test_cifar10_as_numpy_1_wrote_it(tmp_path):
    folder = tmp_path / "named" / "cifar-10-batches-py"
    write_cifar(folder)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))
    assert data.load("cifar10").labels.shape == (10,)


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    folder = tmp_path / "named" / "cifar-10-batches-py"
    write_cifar(folder)
    (folder / "data_batch_3").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"data_batch_3 is damaged: builtins.print"):
        data.load("cifar10")
    assert capsys.readouterr().out == ""


def test_split_normalises_by_the_training_samples():
    digits = data.load("digits")
    parts = data.split(digits, 1000, 500)
    x, y = parts.train
    assert x.shape == (1000, 1, 8, 8) and y.shape == (1000,)
    torch.testing.assert_close(x.mean(dim=0), torch.zeros(1, 8, 8), atol=1e-5, rtol=0)
    assert x.square().mean().item() == pytest.approx(1, abs=1e-5)
    assert len(parts.validation[1]) == 500
    again = data.split(digits, 1000, 500)
    assert torch.equal(x, again.train[0])
    everything = data.split(digits, 1797, 0)
    assert sorted(everything.train[1].tolist()) == sorted(digits.labels.tolist())


@pytest.mark.parametrize("sizes", [(1797, 1), (0, 10), (2000, 0)])
def test_split_refuses_more_than_there_is(sizes):
    with pytest.raises(ValueError, match="1797 samples"):
        data.split(data.load("digits"), *sizes)
