import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from tkn.data import pain_synthetic
from tkn.data.base import DataSet

load: Callable[..., DataSet] = partial(
    pain_synthetic.load_pain_synthetic, subjects=8, sequences=1, frames=12, test_subjects=3
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data_dir = tmp_path_factory.mktemp("data")
    load(data_dir)
    return data_dir


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_archive(folder: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Labels [subjects, frames] and landmarks [subjects, frames, 66, 2]."""
    label_files, mark_files = sorted(folder.rglob("*_facs.txt")), sorted(folder.rglob("*_aam.txt"))
    labels = np.array([float(path.read_text()) for path in label_files]).reshape(8, 12)
    return labels, np.stack([np.loadtxt(path) for path in mark_files]).reshape(8, 12, 66, 2)


def test_data_set(folder: Path) -> None:
    data = load(folder)
    assert data.name == "pain_synthetic"
    assert data.source.startswith("synthetic: 8 drawn subjects")
    assert (data.task, data.input_size, data.num_outputs) == ("regression", (3, 48, 48), 1)
    assert (len(data.train), len(data.test)) == (60, 36)


def test_same_bytes_twice(folder: Path, tmp_path: Path) -> None:
    load(tmp_path / "new" / "folder")
    assert read_files(tmp_path / "new" / "folder") == read_files(folder)


def test_another_seed_is_another_archive(tmp_path: Path) -> None:
    few: Callable[..., DataSet] = partial(load, tmp_path, subjects=2, frames=3, test_subjects=1)
    first, second = few(seed=1), few(seed=2)
    assert len(list(tmp_path.iterdir())) == 2
    assert not torch.equal(first.train.inputs[0], second.train.inputs[0])


def test_drawn_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(pain_synthetic, "_write_archive")
    load(folder)


def test_layout(folder: Path) -> None:
    (root,) = folder.iterdir()
    frame = r"\d{3}-(?P<code>[a-z]{2}\d{3})/(?P<sequence>(?P=code)t\daaaff)/(?P=sequence)\d{3}"
    patterns = rf"Images/{frame}\.png", rf"AAM_landmarks/{frame}_aam\.txt", rf"Frame_Labels/PSPI/{frame}_facs\.txt"
    files = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    assert [sum(re.fullmatch(pattern, file) is not None for file in files) for pattern in patterns] == [96, 96, 96]
    assert len(files) == 3 * 96
    with Image.open(next(root.rglob("*.png"))) as image:
        assert (image.size, image.mode) == ((320, 240), "RGB")
    number = r" {3}\d\.\d{7}e[+-]\d\d"
    assert re.fullmatch(rf"({number}{number}\n){{66}}", next(root.rglob("*_aam.txt")).read_text())
    assert re.fullmatch(rf"{number}\n", next(root.rglob("*_facs.txt")).read_text())


def test_labels_are_zero_but_for_a_ramp(folder: Path) -> None:
    labels, _ = read_archive(folder)
    assert (labels == 0).mean() > 0.5
    assert labels.max() <= 16
    for sequence in labels:
        peak = sequence.argmax()
        assert sequence[peak] >= 3
        assert (np.diff(sequence[: peak + 1]) >= 0).all()
        assert (np.diff(sequence[peak:]) <= 0).all()


def test_expression_follows_the_label(folder: Path) -> None:
    labels, marks = read_archive(folder)
    across = marks[:, :, 16] - marks[:, :, 0]
    width = np.linalg.norm(across, axis=-1)

    def correlate(length: NDArray[np.float64]) -> float:
        """Of a length in units of the face's width, beyond what it is in the subject's neutral face."""
        length = length / width
        return np.corrcoef((length - length[:, :1]).ravel(), labels.ravel())[0, 1]

    def distance(a: int, b: int) -> NDArray[np.float64]:
        return np.linalg.norm(marks[:, :, a] - marks[:, :, b], axis=-1)

    assert (labels[:, 0] == 0).all()
    assert correlate(distance(61, 64)) > 0.95
    assert correlate(distance(48, 54)) > 0.95
    assert correlate(distance(37, 41) + distance(44, 46)) < -0.95
    brow_height = np.linalg.det(np.stack([across, marks[:, :, 27] - marks[:, :, 19]], axis=-2)) / width
    assert correlate(brow_height) < -0.95


def test_landmarks_are_on_the_drawn_features(folder: Path) -> None:
    """Lips are redder than the skin of the cheeks, and the nose's ridge is darker."""
    (root,) = folder.iterdir()
    for path in sorted((root / "Images").rglob("*001.png")):
        marks = np.loadtxt(root / "AAM_landmarks" / path.relative_to(root / "Images").with_name(f"{path.stem}_aam.txt"))
        with Image.open(path) as image:
            picture = np.asarray(image).astype(float)

        def colour(point: NDArray[np.float64], picture: NDArray[np.float64] = picture) -> NDArray[np.float64]:
            x, y = point.astype(int)
            return picture[y, x]

        cheek = colour((marks[31] + marks[3]) / 2)
        lip = colour((marks[51] + marks[61]) / 2)
        assert lip[0] - lip[1] > cheek[0] - cheek[1] + 10
        assert colour(marks[28]).sum() < 0.95 * cheek.sum()


def test_label_is_still_visible_after_the_warp(folder: Path) -> None:
    """A linear fit on the training subjects' warped faces predicts the test subjects' labels."""
    data = load(folder)
    train, test = (data.to_input(split.inputs, False).flatten(1).double() for split in (data.train, data.test))
    mean = train.mean(dim=0)
    train, test = train - mean, test - mean
    dual = torch.linalg.solve(train @ train.T + 10 * torch.eye(len(train)), data.train.targets.double())
    prediction = test @ train.T @ dual
    assert torch.corrcoef(torch.cat([prediction, data.test.targets], dim=1).T)[0, 1] > 0.8


def test_nothing_left_behind_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, calls = pain_synthetic._draw, iter(range(100))

    def fail_late(*args: object) -> object:
        if next(calls) == 20:
            raise KeyboardInterrupt
        return draw(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(pain_synthetic, "_draw", fail_late)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_runs_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run's archive appears while this one draws: it is used, and nothing else stays."""
    write = pain_synthetic._write_archive

    def write_both(root: Path, *args: object) -> None:
        write(root, *args)  # type: ignore[arg-type]
        copytree(root, tmp_path / root.name)

    monkeypatch.setattr(pain_synthetic, "_write_archive", write_both)
    assert len(load(tmp_path, subjects=2, frames=3, test_subjects=1).train) == 3
    (root,) = tmp_path.iterdir()
    assert root.name == "pain_synthetic-v1-2x1x3-seed0"


@pytest.mark.parametrize("key", ["subjects", "sequences", "frames"])
def test_impossible_counts(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.{key}=0: must be at least 1"):
        load(tmp_path, **{key: 0})


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_impossible_seed(tmp_path: Path, seed: int) -> None:
    with pytest.raises(ValueError, match=rf"data\.seed={seed}"):
        load(tmp_path, seed=seed)


def test_folds_are_of_subjects_and_alike(folder: Path) -> None:
    labels, _ = read_archive(folder)
    tested = []
    for fold in range(4):
        data = load(folder, folds=4, fold=fold)
        assert data.source == (
            f"synthetic: 8 drawn subjects, 1 sequences of 12 frames each, seed 0, fold {fold} of 4, seed 0"
        )
        assert (len(data.train), len(data.test)) == (72, 24)
        frames = data.test.targets[:, 0].numpy().reshape(2, 12)
        tested += [row.tolist() for row in frames]
        assert abs((frames == 0).mean() - (labels == 0).mean()) < 0.1
    assert sorted(tested) == sorted(labels.tolist())


def test_too_few_subjects(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.test_subjects=8: .* 8 subjects"):
        load(folder, test_subjects=8)
