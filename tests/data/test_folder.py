from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_images import write_folder, write_image
from PIL import Image

from tkn.data import DataSet, load_data
from tkn.data.preparation import IMAGENET

COUNTS = {"train/cat": 6, "train/dog": 4, "test/cat": 3, "test/dog": 2}


def load(path: Path, **options: Any) -> DataSet:
    return load_data("folder", "unused", path=str(path), **options)


def test_two_folders(tmp_path: Path) -> None:
    data = load(write_folder(tmp_path / "pets", COUNTS))
    assert (data.task, data.classes, data.num_outputs, data.input_size) == (
        "classification",
        ("cat", "dog"),
        2,
        (3, 10, 12),
    )
    assert data.source == f"own: {tmp_path}/pets, 10 images to train and 5 to test, 2 classes"
    assert data.train.targets.bincount().tolist() == [6, 4]
    assert data.test.targets.bincount().tolist() == [3, 2]
    # Each image once, with its class, as it is in its file.
    images = {
        image.numpy().tobytes(): int(label) for image, label in zip(*data.train.inputs, data.train.targets, strict=True)
    }
    for name, label in (("cat", 0), ("dog", 1)):
        for path in (tmp_path / "pets/train" / name).glob("*.png"):
            assert images.pop(np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes()) == label
    assert not images
    expected = data.train.inputs[0].float() / 255
    assert torch.equal(data.inputs(data.train), expected)


def test_one_tree_is_divided(tmp_path: Path) -> None:
    write_folder(tmp_path, {"10": 8, "9": 8})
    write_image(tmp_path / "9" / "deeper" / "more.png", 99)
    data = load(tmp_path, test_share=0.25)
    assert data.classes == ("9", "10")  # by value
    assert (len(data.train), len(data.test)) == (13, 4)
    assert data.source.endswith("2 classes, test_share 0.25, seed 0")
    tested: list[bytes] = []
    for fold in range(3):
        data = load(tmp_path, folds=3, fold=fold)
        assert data.source.endswith(f"fold {fold} of 3, seed 0")
        tested += [image.numpy().tobytes() for image in data.test.inputs[0]]
    assert len(tested) == len(set(tested)) == 17


def test_a_share_divides_train_and_test_anew(tmp_path: Path) -> None:
    data = load(write_folder(tmp_path, COUNTS), test_share=0.2)
    assert (len(data.train), len(data.test)) == (12, 3)


def test_size_channels_and_normalisation(tmp_path: Path) -> None:
    write_folder(tmp_path, COUNTS)
    write_image(tmp_path / "train/cat/large.png", 7, (40, 30), "L")
    data = load(tmp_path, size=[8, 9], channels=3, normalise="imagenet")
    assert data.input_size == (3, 8, 9)
    assert data.preparation is not None
    pixels = data.test.inputs[0]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    torch.testing.assert_close(data.inputs(data.test), (pixels / 255 - mean) / std)
    with Image.open(tmp_path / "test/dog/000.png") as image:
        assert any(torch.equal(data.preparation(image), x) for x in data.inputs(data.test))
    assert load(tmp_path, size=16, channels=1).input_size == (1, 16, 16)


def test_grey_images_stay_grey(tmp_path: Path) -> None:
    assert load(write_folder(tmp_path, COUNTS, mode="L")).input_size == (1, 10, 12)


def test_images_from_files_are_those_in_memory(tmp_path: Path) -> None:
    write_folder(tmp_path, COUNTS)
    kept, read = load(tmp_path, size=8), load(tmp_path, size=8, memory=0.0, workers=2)
    assert kept.read is None
    assert read.read is not None
    for part in ("train", "test"):
        assert torch.equal(kept.inputs(getattr(kept, part)), read.inputs(getattr(read, part)))
        assert torch.equal(getattr(kept, part).targets, getattr(read, part).targets)


def test_augmentation_is_for_training(tmp_path: Path) -> None:
    data = load(write_folder(tmp_path, COUNTS), augment={"flip": True, "shift": 0.2})
    assert torch.equal(data.inputs(data.train), data.train.inputs[0].float() / 255)
    assert not torch.equal(data.inputs(data.train, augment=True), data.inputs(data.train))


def _spoil(root: Path, how: str) -> None:
    path = root / "train/cat/002.png"
    if how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("no image")
    elif how == "truncated":
        write_image(path, 0, (64, 64))
        path.write_bytes(path.read_bytes()[:3000])
    elif how == "deep":
        Image.fromarray(np.full((10, 12), 40_000, np.uint16)).save(path)
    elif how == "exif":
        write_image(path, 0)
        Image.open(path).save(path, exif=b"Exif\0\0garbage!")
    elif how == "animated":
        frames = [Image.fromarray(np.full((10, 12), value, np.uint8)) for value in (0, 99)]
        frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("memory", [4.0, 0.0])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("empty", "is empty"),
        ("text", "is not a readable image"),
        ("deep", "it has more than 8 bits a channel"),
        ("animated", "is animated or has several pages: 2 images"),
        ("truncated", "is damaged or truncated"),
        ("exif", "its EXIF data are damaged"),
    ],
)
def test_bad_images_are_named(tmp_path: Path, how: str, message: str, memory: float) -> None:
    write_folder(tmp_path, COUNTS)
    _spoil(tmp_path, how)
    with pytest.raises(ValueError, match=rf"train/cat/002\.png:? {message}"):  # noqa: PT012
        data = load(tmp_path, size=8, memory=memory)
        data.inputs(data.train)  # what the header does not tell is found when an image is read


def test_other_kinds_of_images_are_converted(tmp_path: Path) -> None:
    write_folder(tmp_path, COUNTS)
    for number, (mode, suffix) in enumerate(
        [("CMYK", "jpg"), ("P", "gif"), ("RGBA", "png"), ("1", "tif"), ("LA", "webp")]
    ):
        write_image(tmp_path / f"train/dog/other{number}.{suffix}", number, mode=mode)
    assert len(load(tmp_path, channels=3).train) == 15


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ({}, {}, "has no folders train and test: give data.test_share=0.2, say, or data.folds=5"),
        ({"train/cat": 2, "train/dog": 2}, {}, "has a folder train, but none test"),
        ({"train/cat": 2, "test/cat": 2}, {}, "holds one class only, 'cat'"),
        ({"train/cat": 2, "train/dog": 2, "test/cat": 2}, {}, "class 'dog' is in train only"),
        ({"train/cat": 2, "test/dog": 2, "test/cat": 2}, {}, "class 'dog' is in test only"),
        ({"cat": 9, "dog": 2}, {"folds": 3, "fold": 2}, "class 'dog' has no image to test on with fold 2 of 3"),
        ({"cat": 9, "dog": 9}, {"test_share": 1.0}, "data.test_share=1.0 must be within"),
        (COUNTS, {"size": 7}, "data.size=7 must be one side or .height, width., each at least 8 pixels"),
        (COUNTS, {"size": [8, 8, 8]}, r"data.size=\[8, 8, 8\] must be"),
        (COUNTS, {"channels": 2}, "data.channels=2 must be null, 1 .grey. or 3"),
        (COUNTS, {"normalise": "imagnet"}, "unknown data.normalise 'imagnet'; did you mean 'imagenet'"),
        (COUNTS, {"normalise": "imagenet", "channels": 1}, "give data.channels=3, also for grey images"),
        (COUNTS, {"workers": 0}, "data.workers=0 must be null or at least 1"),
        (COUNTS, {"memory": -1.0}, "data.memory=-1.0 must be at least 0 GiB"),
        (COUNTS, {"augment": {"flop": True}}, "unknown key of data=folder 'augment.flop'; did you mean 'augment.flip'"),
        (COUNTS, {"augment": {"flip": 1}}, "data.augment.flip=1 must be of type bool"),
    ],
)
def test_what_can_not_be(tmp_path: Path, counts: dict[str, int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(write_folder(tmp_path, counts), **options)


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.path=.*nowhere is not a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no folders: there must be one for each class"):
        load(tmp_path, test_share=0.2)
    write_folder(tmp_path, COUNTS)
    (tmp_path / "test" / "bird").mkdir()
    with pytest.raises(ValueError, match=r"test/bird holds no image file: remove it"):
        load(tmp_path)


@pytest.mark.parametrize("memory", [4.0, 0.0])
def test_images_of_several_sizes_need_one(tmp_path: Path, memory: float) -> None:
    write_folder(tmp_path, COUNTS)
    path = tmp_path / "train/dog/odd.png"
    write_image(path, 0, (12, 11))
    with pytest.raises(ValueError, match=r"odd\.png: it has 12x11 pixels, the first image 12x10: .* need data\.size"):
        load(tmp_path, memory=memory)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(np.zeros((12, 10, 3), np.uint8)).save(path, exif=exif)
    data = load(tmp_path, memory=memory)
    assert data.inputs(data.train).shape == (11, 3, 10, 12)
