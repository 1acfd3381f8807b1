"""The SVHN reader on small files in the real format."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from tkn.data import svhn
from tkn.data.svhn import load_svhn

COUNTS = {"train_32x32.mat": 20, "test_32x32.mat": 7}


def _arrays(count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
    return {"X": images, "y": (np.arange(count, dtype=np.uint8)[:, None] % 10) + 1}


@pytest.fixture(autouse=True)
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for the server; nothing in it."""
    folder = tmp_path / "server"
    folder.mkdir()
    monkeypatch.setattr(svhn, "BASE_URL", folder.as_uri())
    return folder


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    (tmp_path / "svhn").mkdir()
    for name, count in COUNTS.items():
        savemat(tmp_path / "svhn" / name, _arrays(count), do_compression=True)
    return tmp_path


def test_pixels_and_labels_are_exact(data_dir: Path) -> None:
    data = load_svhn(data_dir)
    for split, count in zip((data.train, data.test), COUNTS.values(), strict=True):
        arrays = _arrays(count)
        (images,) = split.inputs
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        assert images.shape == (count, 3, 32, 32)
        for i in range(count):
            assert np.array_equal(images[i].permute(1, 2, 0).numpy(), arrays["X"][..., i])
    # 1, 2, ..., 9, then 10, which means the digit 0
    assert data.train.targets.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 2
    assert data.train.targets.dtype == torch.int64
    assert (data.name, data.task, data.input_size, data.num_outputs) == ("svhn", "classification", (3, 32, 32), 10)


def test_source_tells_partial_from_full(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_svhn(data_dir).source == "partial: 20/7 of 73,257/26,032 images"
    with pytest.raises(ValueError, match=r"data.source='full': .*svhn holds 20/7 of 73,257/26,032 images"):
        load_svhn(data_dir, source="full")
    monkeypatch.setattr(svhn, "FULL_COUNTS", (20, 7))
    assert load_svhn(data_dir).source == load_svhn(data_dir, source="full").source == "full"


def test_unknown_source(data_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"data.source 'embedded'; choose from auto, full"):
        load_svhn(data_dir, source="embedded")


@pytest.mark.parametrize("source", ["auto", "full"])
def test_missing_file_that_cannot_be_downloaded(data_dir: Path, source: str) -> None:
    (data_dir / "svhn" / "test_32x32.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"^.*svhn/test_32x32.mat could not be downloaded .*; put the file"):
        load_svhn(data_dir, source=source)


def test_missing_files_are_downloaded(data_dir: Path, server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_svhn(data_dir)
    for name in COUNTS:
        (data_dir / "svhn" / name).rename(server / name)
    monkeypatch.setattr(svhn, "MD5", {name: hashlib.md5((server / name).read_bytes()).hexdigest() for name in svhn.MD5})
    data = load_svhn(data_dir)
    assert torch.equal(data.train.inputs[0], expected.train.inputs[0])
    assert sorted(path.name for path in (data_dir / "svhn").iterdir()) == sorted(COUNTS)


@pytest.mark.parametrize(
    "damage",
    [lambda whole: whole[: len(whole) // 2], lambda whole: whole[:60], lambda _: b"", lambda _: b"<html>" * 99],
    ids=["half", "header", "empty", "foreign"],
)
def test_damaged_file(data_dir: Path, damage: Callable[[bytes], bytes]) -> None:
    path = data_dir / "svhn" / "train_32x32.mat"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"^.*svhn/train_32x32.mat is not a readable SVHN file \(.*\)$"):
        load_svhn(data_dir)


@pytest.mark.parametrize("seed", range(20))
def test_flipped_bytes_are_read_or_refused(data_dir: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path = data_dir / "svhn" / "train_32x32.mat"
    content = bytearray(path.read_bytes())
    for position in rng.integers(0, 200, 3):
        content[position] = rng.integers(256)
    path.write_bytes(content)
    message = ""
    try:
        load_svhn(data_dir)
    except ValueError as error:
        message = str(error)
    assert not message or message.startswith(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": np.zeros((32, 32, 3, 4))}, r"X is float64 \[32, 32, 3, 4\], expected uint8"),
        ({"X": np.zeros((4, 3, 32, 32), np.uint8)}, r"X is uint8 \[4, 3, 32, 32\], expected uint8 \[32, 32, 3, N\]"),
        ({"X": np.zeros((32, 32), np.uint8)}, r"X is uint8 \[32, 32\]"),
        ({"y": np.ones((3, 1), np.uint8)}, r"y is uint8 \[3, 1\], expected numbers \[4, 1\]"),
        ({"y": np.array(list("abcd"))[:, None]}, r"y is .*, expected numbers \[4, 1\]"),
        ({"y": np.array([[0], [1], [2], [3]])}, r"y runs from 0 to 3, expected whole numbers in 1\.\.10"),
        ({"y": np.array([[11], [1], [2], [3]])}, r"y runs from 1 to 11"),
        ({"y": np.array([[1.5], [1], [2], [3]])}, r"y runs from 1\.0 to 3\.0, expected whole numbers"),
    ],
    ids=["dtype", "order", "dimensions", "count", "text", "zero", "eleven", "fraction"],
)
def test_wrong_contents(data_dir: Path, change: dict[str, np.ndarray], message: str) -> None:
    savemat(data_dir / "svhn" / "test_32x32.mat", _arrays(4) | change)
    with pytest.raises(ValueError, match=rf"^.*svhn/test_32x32.mat: {message}"):
        load_svhn(data_dir)


def test_missing_variable(data_dir: Path) -> None:
    savemat(data_dir / "svhn" / "test_32x32.mat", {"X": _arrays(4)["X"]})
    with pytest.raises(ValueError, match=r"svhn/test_32x32.mat is not a readable SVHN file \(KeyError: 'y'\)"):
        load_svhn(data_dir)
