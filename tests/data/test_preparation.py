import json

import numpy as np
import pytest
import torch
from PIL import Image

from tkn.data import load_data
from tkn.data.images import find_images, open_image
from tkn.data.preparation import Preparation


def _photo(mode="RGB", size=(8, 6)):
    pixels = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_an_image_becomes_the_input_of_training():
    image = _photo()
    input = Preparation(3, (6, 8))(image)
    expected = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    torch.testing.assert_close(input, expected, rtol=0, atol=0)
    normalised = Preparation(3, (6, 8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))(image)
    torch.testing.assert_close(normalised[1], (expected[1] - 0.4) / 0.3)
    assert Preparation(1, (3, 5))(image).shape == (1, 3, 5)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_are_converted(mode):
    assert Preparation(3, (4, 4))(_photo(mode)).shape == (3, 4, 4)


def test_more_than_8_bits_are_an_error_and_not_a_guess():
    deep = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    with pytest.raises(ValueError, match="more than 8 bits a channel"):
        Preparation(1, (4, 4))(deep)


def test_photographs_are_turned_upright():
    image = _photo()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.info["exif"] = exif.tobytes()
    torch.testing.assert_close(Preparation(3, (8, 6))(image), Preparation(3, (8, 6))(_photo().transpose(4)))


def test_preparations_are_plain_data():
    for preparation in (Preparation(1, (3, 4)), Preparation(3, (5, 6), (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))):
        assert Preparation.from_dict(json.loads(json.dumps(preparation.to_dict()))) == preparation


@pytest.mark.parametrize(
    "change",
    [
        {"channels": 2},
        {"size": [0, 4]},
        {"size": 4},
        {"mean": [0.5]},
        {"mean": [0.5], "std": [0]},
        {"mean": [0.5, 0.5], "std": [1, 1]},
        {"mean": [float("nan")], "std": [1]},
        {"crop": 3},
    ],
)
def test_impossible_preparations_are_errors(change):
    with pytest.raises(ValueError, match="preparation: "):
        Preparation.from_dict(Preparation(1, (4, 4)).to_dict() | change)


def test_the_projects_data_sets_tell_theirs(tmp_path):
    for name, side in (("mnist", 28), ("tlmnist", 56)):
        data = load_data(name, tmp_path, source="embedded")
        assert data.classes == tuple("0123456789")
        assert data.preparation is not None
        assert data.preparation.input_size == data.input_size == (1, side, side)
        pixels = data.test.inputs[0][:3]
        images = [Image.fromarray(image[0].numpy()) for image in pixels]
        torch.testing.assert_close(torch.stack(list(map(data.preparation, images))), data.to_input((pixels,), False))


def test_image_files_are_found_and_read(tmp_path):
    (tmp_path / "b").mkdir()
    _photo().save(tmp_path / "b" / "two.PNG")
    _photo().save(tmp_path / "one.jpg")
    _photo().save(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("no image")
    found = find_images(tmp_path)
    assert [path.name for path in found] == ["two.PNG", "one.jpg"]
    assert open_image(found[0]).size == (8, 6)


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "image.png"
    with pytest.raises(FileNotFoundError, match=r"image\.png is missing"):
        open_image(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"image\.png is empty"):
        open_image(path)
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"image\.png is not a readable image"):
        open_image(path)
    _photo(size=(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"image\.png is damaged or truncated"):
        open_image(path)
    _photo().save(tmp_path / "moving.gif", save_all=True, append_images=[_photo("L").convert("P")])
    with pytest.raises(ValueError, match=r"moving\.gif is animated or has several pages: 2 images"):
        open_image(tmp_path / "moving.gif")
