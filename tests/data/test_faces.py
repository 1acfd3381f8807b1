from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_images import face_rows, write_faces, write_image
from PIL import Image

from tkn.data import DataSet, load_data
from tkn.data.face import WarpFaces

Rows = list[dict[str, Any]]


def load(path: Path, target: str = "mood", **options: Any) -> DataSet:
    return load_data("faces", "unused", path=str(path), target=target, size=16, **options)


def test_classes(tmp_path: Path) -> None:
    data = load(write_faces(tmp_path / "people", face_rows(24)))
    assert (data.task, data.classes, data.input_size) == ("classification", ("calm", "glad"), (3, 16, 16))
    assert data.source == f"own: {tmp_path}/people, 18 faces to train and 6 to test, mood (2 classes)"
    crops, landmarks = data.train.inputs
    assert (crops.shape, crops.dtype) == ((18, 3, 32, 32), torch.uint8)
    assert (landmarks.shape, landmarks.dtype) == ((18, 9, 2), torch.float32)
    assert not data.grouped
    assert data.preparation is None


def test_numbers(tmp_path: Path) -> None:
    data = load(write_faces(tmp_path, face_rows(24)), "age", task="regression")
    assert (data.task, data.num_outputs, data.classes) == ("regression", 1, ())
    assert sorted(data.test.targets[:, 0].tolist()) == [20 + index for index in range(24) if index % 4 == 3]
    assert data.source.endswith("age (a number)")


def test_numbers_may_be_classes(tmp_path: Path) -> None:
    rows = face_rows(24)
    for row in rows:
        row["age"] = 8 + len(row["mood"]) * (row["mood"] == "glad") // 2  # "8" and "10"
    data = load(write_faces(tmp_path, rows), "age", task="classification")
    assert data.classes == ("8", "10")
    with pytest.raises(ValueError, match=r"data\.target=age is a column of numbers: give data\.task=classification or"):
        load(tmp_path, "age")


def test_the_reference_is_of_the_training_faces_alone(tmp_path: Path) -> None:
    rows = face_rows(24)
    before = load(write_faces(tmp_path, rows)).to_input
    for row in rows:
        if row["split"] == "test":
            row["x4"], row["y4"] = row["x4"] + 5, row["y4"] - 5
    after = load(write_faces(tmp_path, rows)).to_input
    assert isinstance(before, WarpFaces)
    assert isinstance(after, WarpFaces)
    assert torch.equal(before.warp.face.points, after.warp.face.points)


def test_augmentation_and_normalisation(tmp_path: Path) -> None:
    data = load(write_faces(tmp_path, face_rows(24)))
    plain = data.inputs(data.train)
    assert torch.equal(plain, data.inputs(data.train))
    torch.manual_seed(0)
    first = data.inputs(data.train, augment=True)
    assert not torch.equal(first, plain)
    torch.manual_seed(0)
    assert torch.equal(first, data.inputs(data.train, augment=True))
    off = load(tmp_path, landmark_noise=0.0, flip=False)
    assert torch.equal(off.inputs(off.train, augment=True), off.inputs(off.train))
    normalised = load(tmp_path, normalise="imagenet")
    torch.testing.assert_close(normalised.inputs(normalised.train)[:, 1], (plain[:, 1] - 0.456) / 0.224)


@pytest.mark.parametrize("options", [{"folds": 4, "fold": 1}, {"test_share": 0.25}])
def test_groups_are_not_parted(tmp_path: Path, options: dict[str, Any]) -> None:
    rows = face_rows(48)
    data = load(write_faces(tmp_path, rows, without=("split",)), "age", task="regression", **options)
    assert data.grouped
    subjects = [{(int(age) - 20) // 3 for age in split.targets[:, 0]} for split in (data.train, data.test)]
    assert len(subjects[0]) + len(subjects[1]) == 16
    assert 3 <= len(subjects[1]) <= 5


def test_a_subject_in_both_parts(tmp_path: Path) -> None:
    write_faces(tmp_path, face_rows(24), without=())
    with pytest.raises(ValueError, match=r"people\.csv, line 5: group 's1' is for testing here, and for training"):
        load(tmp_path)


@pytest.mark.parametrize(("share", "part"), [(0.01, "test"), (0.99, "train")])
@pytest.mark.parametrize("target", ["age", "mood"])
def test_a_share_that_leaves_no_face(tmp_path: Path, share: float, part: str, target: str) -> None:
    write_faces(tmp_path, face_rows(24))
    task = "regression" if target == "age" else None
    message = rf"people\.csv: no face is left to {part} on with test_share {share}, seed 0"
    with pytest.raises(ValueError, match=message):
        load(tmp_path, target, task=task, test_share=share)


def test_landmarks_are_of_the_upright_image(tmp_path: Path) -> None:
    write_faces(tmp_path, face_rows(24))
    before = load(tmp_path)
    path = tmp_path / "images" / "f004.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    with Image.open(path) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    assert torch.equal(load(tmp_path).train.inputs[0], before.train.inputs[0])


@pytest.mark.parametrize("name", ["f002.png", "images/f002.png", "../images/f002.png"])
@pytest.mark.parametrize("without", ["group", ""])
def test_an_image_in_both_parts(tmp_path: Path, name: str, without: str) -> None:
    rows = face_rows(24)
    for number, row in enumerate(rows):
        row["group"] = f"s{number}"
    write_faces(tmp_path, rows, without=(without,))
    rows[3]["file"] = name
    with pytest.raises(ValueError, match=rf"line 5: file '{name}' is for testing here, and for training in line 4"):
        load(write_faces(tmp_path, rows, without=(without,)))


@pytest.mark.parametrize("without", ["group", ""])
def test_an_image_is_not_parted(tmp_path: Path, without: str) -> None:
    rows = face_rows(24)
    write_faces(tmp_path, rows)
    for number, row in enumerate(rows):  # two faces an image, of two groups
        row |= {"file": ("", "images/")[number % 2] + f"f{number // 2:03}.png", "group": f"s{number}"}
    data = load(write_faces(tmp_path, rows, without=("split", without)), "age", task="regression", test_share=0.25)
    assert data.grouped
    images = [{(int(age) - 20) // 2 for age in split.targets[:, 0]} for split in (data.train, data.test)]
    assert len(images[0]) + len(images[1]) == 12


def test_landmarks_a_little_outside_are_kept(tmp_path: Path) -> None:
    rows = face_rows(24)
    rows[0] |= {"x0": -3.0}
    assert len(load(write_faces(tmp_path, rows)).train) == 18


def _write(path: Path, rows: Rows, change: dict[str, Any]) -> None:
    rows[4] |= change
    write_faces(path, rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x3": "nose"}, r"line 6: x3 is 'nose', expected a number of pixels"),
        ({"y0": "nan"}, r"line 6: y0 is 'nan', expected"),
        ({"y0": "inf"}, r"line 6: y0 is 'inf', expected"),
        ({"y0": ""}, r"line 6: y0 is '', expected"),
        ({"x8": 75.0}, r"line 6: .*f004\.png: landmark 8 at \(75, .*\) is outside the image of 60x50 pixels"),
        ({"x8": -25.0}, r"landmark 8 at \(-25, .*\) is outside the image"),
        (
            {f"{axis}{k}": 20 for k in range(9) for axis in "xy"},
            r"f004\.png: its landmarks do not span a face",
        ),
        ({"mood": ""}, r"line 6: column mood is empty"),
        ({"split": "valid"}, r"line 6: split is 'valid', expected train or test"),
        ({"mood": "sad"}, r"class 'sad' has no image to test on"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    _write(tmp_path, face_rows(24), change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_bad_numbers_are_named(tmp_path: Path) -> None:
    _write(tmp_path, face_rows(24), {"age": "old"})
    with pytest.raises(ValueError, match=r"people\.csv, line 6: age is 'old', expected a number"):
        load(tmp_path, "age", task="regression")


@pytest.mark.parametrize(
    ("without", "options", "message"),
    [
        (("x5", "group"), {}, r"people\.csv: the first line has no column 'x5'"),
        (("y8", "group"), {}, r"the first line has no column 'y8'"),
        (("file", "group"), {}, r"the first line has no column 'file'"),
        (("split", "group"), {}, r"has no column 'split': give data\.test_share=0\.2, say, or data\.folds=5"),
        (("group",), {"target": "mod"}, r"people\.csv: unknown column in data\.target 'mod'; did you mean 'mood'"),
        (("group",), {"task": "clasification"}, r"unknown data\.task 'clasification'; did you mean 'classification'"),
        (("group",), {"landmark_noise": -0.1}, r"data\.landmark_noise=-0\.1: must be a number >= 0"),
        (("group",), {"mirror": [[0, 1]], "flip": False}, r"data\.mirror is for data\.flip=true"),
        (("group",), {"folds": 3, "fold": 3}, r"data\.fold=3 must be 0 to 2"),
        ((), {"folds": 20}, r"data\.folds=20: the groups to divide are only 8"),
    ],
)
def test_what_can_not_be(tmp_path: Path, without: tuple[str, ...], options: dict[str, Any], message: str) -> None:
    write_faces(tmp_path, face_rows(24), without=without)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **options)


def test_bad_tables(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold one CSV file .*, and holds none"):
        load(tmp_path)
    table = write_faces(tmp_path, face_rows(24)) / "people.csv"
    text = table.read_text()
    for content, message in (
        ("", r"people\.csv: the first line has no column 'file'"),
        (text.splitlines()[0], "has no rows below its first line"),
        (text.replace(",", ";"), "must be parted by commas, not semicolons"),
        (text.replace("calm", "calm,too", 1), r"people\.csv, line 2: 23 fields, expected 22"),
        (text.replace("x1,", "x0,", 1), "there are two columns 'x0'"),
    ):
        table.write_text(content)
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    table.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"is not a readable CSV file"):
        load(tmp_path)
    table.with_name("other.csv").write_text(text)
    with pytest.raises(ValueError, match=r"holds several: other\.csv, people\.csv"):
        load(tmp_path)


def test_bad_images_are_named(tmp_path: Path) -> None:
    write_faces(tmp_path, face_rows(24))
    path = tmp_path / "images" / "f004.png"
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"people\.csv, line 6: f004\.png is neither in .* nor in its images"):
        load(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"people\.csv, line 6: .*f004\.png is empty"):
        load(tmp_path)
    Image.fromarray(np.full((50, 60), 40_000, np.uint16)).save(path)
    with pytest.raises(ValueError, match=r"line 6: .*f004\.png: it has more than 8 bits a channel"):
        load(tmp_path)
    write_image(path, 0, (60, 50), "CMYK" if path.suffix == ".jpg" else "L")
    assert len(load(tmp_path).train) == 18
