"""The GTSRB reader on a small set in the real layout: 43 classes of one image, two test images."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tkn.data import gtsrb
from tkn.data.gtsrb import HEADER, load_gtsrb

SIZE, BOX = (42, 40), (5, 6, 35, 31)
CLASS_7 = Path("GTSRB/Training/00007")


def _colour(label: int) -> tuple[int, int, int]:
    return label * 5, 255 - label * 5, 7


def _save_sign(path: Path, label: int, size: tuple[int, int] = SIZE, box: tuple[int, int, int, int] = BOX) -> None:
    """Noise, with the box in one colour."""
    pixels = np.random.default_rng(label).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = _colour(label)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _row(name: str, label: object, size: tuple[int, int] = SIZE, box: tuple[int, int, int, int] = BOX) -> str:
    return ";".join(map(str, (name, *size, *box, label)))


def _write_csv(path: Path, *rows: str) -> None:
    path.write_bytes("\r\n".join([HEADER, *rows, ""]).encode())


@pytest.fixture(autouse=True)
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for the server; nothing in it."""
    folder = tmp_path / "server"
    folder.mkdir()
    monkeypatch.setattr(gtsrb, "BASE_URL", folder.as_uri())
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "gtsrb"
    for label in range(43):
        class_folder = root / gtsrb.TRAIN / f"{label:05d}"
        _save_sign(class_folder / "00000_00000.ppm", label)
        _write_csv(class_folder / f"GT-{label:05d}.csv", _row("00000_00000.ppm", label))
    for number, label in enumerate((42, 3)):
        _save_sign(root / gtsrb.TEST / f"{number:05d}.ppm", label)
    _write_csv(root / gtsrb.TEST_LABELS, _row("00000.ppm", 42), _row("00001.ppm", 3))
    return root


def test_box_is_cropped_exactly(folder: Path) -> None:
    data = load_gtsrb(folder.parent)
    assert sorted(data.train.targets.tolist()) == list(range(43))
    assert data.test.targets.tolist() == [42, 3]
    for split in (data.train, data.test):
        (images,) = split.inputs
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        assert images.shape == (len(split), 3, 32, 32)
        colours = torch.tensor([_colour(label) for label in split.targets.tolist()])
        assert torch.equal(images.long(), colours[:, :, None, None].expand(-1, -1, 32, 32))
    assert (data.name, data.task, data.input_size, data.num_outputs) == ("gtsrb", "classification", (3, 32, 32), 43)


def test_tracks_stay_together_in_a_fixed_shuffled_order(folder: Path) -> None:
    for label in range(43):
        frames = [f"{track:05d}_{frame:05d}.ppm" for track in range(2) for frame in range(3)]
        class_folder = folder / "GTSRB/Training" / f"{label:05d}"
        for name in frames:
            _save_sign(class_folder / name, label)
        _write_csv(class_folder / f"GT-{label:05d}.csv", *(_row(name, label) for name in frames))
    first, second = load_gtsrb(folder.parent).train, load_gtsrb(folder.parent).train
    assert first.targets.equal(second.targets)
    tracks = first.targets.reshape(-1, 3)
    assert (tracks == tracks[:, :1]).all()
    assert tracks[:, 0].tolist() != sorted(tracks[:, 0].tolist())
    assert torch.equal(first.targets.bincount(), torch.full((43,), 6))


def test_box_of_32_pixels_keeps_its_pixels(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 44, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / gtsrb.TEST / "00000.ppm")
    _write_csv(folder / gtsrb.TEST_LABELS, _row("00000.ppm", 1, (44, 50), (5, 11, 37, 43)))
    image = load_gtsrb(folder.parent).test.inputs[0][0]
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels[11:43, 5:37])


def test_box_may_fill_the_image(folder: Path) -> None:
    _save_sign(folder / gtsrb.TEST / "00000.ppm", 9, (30, 40), (0, 0, 30, 40))
    _write_csv(folder / gtsrb.TEST_LABELS, _row("00000.ppm", 9, (30, 40), (0, 0, 30, 40)))
    image = load_gtsrb(folder.parent).test.inputs[0][0]
    assert torch.equal(image.long(), torch.tensor(_colour(9))[:, None, None].expand(-1, 32, 32))


def test_box_is_scaled_with_a_rescaled_copy(folder: Path) -> None:
    # Recorded at three times the file's width and twice its height.
    box = (BOX[0] * 3, BOX[1] * 2, BOX[2] * 3, BOX[3] * 2)
    _write_csv(folder / gtsrb.TEST_LABELS, _row("00000.ppm", 42, (SIZE[0] * 3, SIZE[1] * 2), box))
    data = load_gtsrb(folder.parent)
    assert torch.equal(data.test.inputs[0][0].long(), torch.tensor(_colour(42))[:, None, None].expand(-1, 32, 32))
    assert data.source.endswith("(1 of 44 images are copies rescaled to 42x40)")


def test_scaled_box_keeps_its_fractions(folder: Path) -> None:
    # 10..40 of 50 columns is 12.8..51.2 of 64: output column j is centred on 12.8 + 1.2 (j + 0.5).
    ramp = np.broadcast_to((3 * np.arange(64, dtype=np.uint8))[None, :, None], (64, 64, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(folder / gtsrb.TEST / "00000.ppm")
    _write_csv(folder / gtsrb.TEST_LABELS, _row("00000.ppm", 1, (50, 50), (10, 10, 40, 40)))
    image = load_gtsrb(folder.parent).test.inputs[0][0].double()
    expected = 3 * (12.8 + 1.2 * (torch.arange(32) + 0.5) - 0.5)
    # The outermost columns have no neighbours on one side.
    assert (image - expected)[..., 2:-2].abs().max() <= 0.75


def test_source_tells_partial_from_full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_gtsrb(folder.parent).source == "partial: 43/2 of 39,209/12,630 images"
    with pytest.raises(ValueError, match=r"data.source='full': .*gtsrb holds 43/2 of 39,209/12,630 images"):
        load_gtsrb(folder.parent, source="full")
    monkeypatch.setattr(gtsrb, "FULL_COUNTS", (43, 2))
    assert load_gtsrb(folder.parent).source == load_gtsrb(folder.parent, source="full").source == "full"
    _save_sign(folder / gtsrb.TEST / "00000.ppm", 42, (21, 20))
    _save_sign(folder / gtsrb.TEST / "00001.ppm", 3, (84, 80))
    assert load_gtsrb(folder.parent, source="full").source == "full (2 of 45 images are copies rescaled)"


def test_unknown_source(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"data.source 'fulll'; did you mean 'full'"):
        load_gtsrb(folder.parent, source="fulll")


@pytest.mark.parametrize("source", ["auto", "full"])
@pytest.mark.parametrize("part", gtsrb.ARCHIVES)
def test_missing_part_that_cannot_be_downloaded(folder: Path, part: str, source: str) -> None:
    (folder / part).rename(folder / "elsewhere")
    archive = gtsrb.ARCHIVES[part][0]
    with pytest.raises(FileNotFoundError, match=rf"^{folder / part} is missing: .*{archive} could not .*unpack"):
        load_gtsrb(folder.parent, source=source)


def test_missing_parts_are_downloaded(folder: Path, server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_gtsrb(folder.parent)
    archives = {}
    for part, (archive, _) in gtsrb.ARCHIVES.items():
        shutil.make_archive(str(server / Path(archive).stem), "zip", folder, part)
        archives[part] = (archive, hashlib.md5((server / archive).read_bytes()).hexdigest())
    monkeypatch.setattr(gtsrb, "ARCHIVES", archives)
    shutil.rmtree(folder)
    data = load_gtsrb(folder.parent)
    for split, other in ((data.train, expected.train), (data.test, expected.test)):
        assert torch.equal(split.inputs[0], other.inputs[0])
        assert torch.equal(split.targets, other.targets)
    assert sorted(path.name for path in folder.iterdir()) == ["GT-final_test.csv", "GTSRB"]


def test_interrupted_unpacking_leaves_nothing(folder: Path, server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = gtsrb.ARCHIVES[gtsrb.TRAIN][0]
    shutil.make_archive(str(server / Path(archive).stem), "zip", folder, gtsrb.TRAIN)
    md5 = hashlib.md5((server / archive).read_bytes()).hexdigest()
    monkeypatch.setattr(gtsrb, "ARCHIVES", {gtsrb.TRAIN: (archive, md5)})
    shutil.rmtree(folder)

    def interrupt(_: object, path: str) -> None:
        (Path(path) / gtsrb.TRAIN).mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("zipfile.ZipFile.extractall", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_gtsrb(folder.parent)
    assert list(folder.iterdir()) == []


def test_missing_class_folder(folder: Path) -> None:
    shutil.rmtree(folder / CLASS_7)
    with pytest.raises(FileNotFoundError, match=r"^.*Training/00007/GT-00007.csv is missing$"):
        load_gtsrb(folder.parent)


def test_missing_image(folder: Path) -> None:
    (folder / CLASS_7 / "00000_00000.ppm").unlink()
    with pytest.raises(FileNotFoundError, match=r"00007/00000_00000.ppm is missing, named in .*GT-00007.csv, line 2$"):
        load_gtsrb(folder.parent)


@pytest.mark.parametrize(
    "damage",
    [lambda whole: whole[:-9], lambda whole: whole[:5], lambda _: b"", lambda whole: b"P6\n1 x\n255\n" + whole],
    ids=["truncated", "header", "empty", "malformed"],
)
def test_damaged_image(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / CLASS_7 / "00000_00000.ppm"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"^{path} is not a readable PPM image \(\w+\)$"):
        load_gtsrb(folder.parent)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("00000_00000.ppm;42;40;5;6;35;31", "does not give Filename;Width;"),
        ("00000_00000.ppm;42;40;5;6;35;31;7;7", "does not give Filename;Width;"),
        ("00000_00000.ppm;42;40;5;six;35;31;7", "does not give Filename;Width;"),
        ("", "'' does not give Filename;Width;"),
        (_row("00000_00000.ppm", 7, box=(5, 6, 43, 31)), "the box 5,6-43,31 is not inside the 42x40 image"),
        (_row("00000_00000.ppm", 7, box=(5, 6, 35, 41)), "the box 5,6-35,41 is not inside"),
        (_row("00000_00000.ppm", 7, box=(-1, 6, 35, 31)), "the box -1,6-35,31 is not inside"),
        (_row("00000_00000.ppm", 7, box=(5, 31, 35, 31)), "the box 5,31-35,31 is not inside"),
        (_row("00000_00000.ppm", 43), r"ClassId is 43, expected 7\.\.7"),
    ],
    ids=["short", "long", "word", "blank", "right", "bottom", "left", "flat", "class"],
)
def test_broken_row(folder: Path, row: str, message: str) -> None:
    path = folder / CLASS_7 / "GT-00007.csv"
    _write_csv(path, _row("00000_00000.ppm", 7), row)
    with pytest.raises(ValueError, match=rf"^{path}, line 3: .*{message}"):
        load_gtsrb(folder.parent)


@pytest.mark.parametrize("label", [43, -1])
def test_test_label_out_of_range(folder: Path, label: int) -> None:
    _write_csv(folder / gtsrb.TEST_LABELS, _row("00000.ppm", label))
    with pytest.raises(ValueError, match=rf"GT-final_test.csv, line 2: ClassId is {label}, expected 0\.\.42"):
        load_gtsrb(folder.parent)


def test_wrong_header(folder: Path) -> None:
    (folder / gtsrb.TEST_LABELS).write_text("Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2\n")
    with pytest.raises(ValueError, match=r"GT-final_test.csv: the first line must be Filename;.*;ClassId$"):
        load_gtsrb(folder.parent)


def test_binary_annotations(folder: Path) -> None:
    (folder / gtsrb.TEST_LABELS).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"GT-final_test.csv is not a text file"):
        load_gtsrb(folder.parent)
