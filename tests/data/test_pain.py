from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tkn.data.base import DataSet, is_whole
from tkn.data.face import PAIN_FACE, REFERENCE, WarpFaces, pixel_weights
from tkn.data.fold_source import Fold, read_fold
from tkn.data.pain import CROP, load_pain

SUBJECTS = ["042-ll042", "043-jh043", "047-jl047", "048-aa048"]
SIZE = (100, 80)
#: Landmarks of every test picture, in pixels: x = 10 + 60 u, y = 15 + 50 v of the reference.
FACE = REFERENCE.double().numpy() * [60, 50] + [10, 15]


def write_frame(root: Path, subject: str, sequence: str, number: int, label: float, shift: float = 0) -> None:
    """A picture whose red is its x and whose green is its y, in pixels."""
    stem = f"{sequence}{number:03d}"
    for kind in ("Images", "AAM_landmarks", "Frame_Labels/PSPI"):
        (root / kind / subject / sequence).mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[: SIZE[1], : SIZE[0]]
    picture = np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8)
    Image.fromarray(picture).save(root / "Images" / subject / sequence / f"{stem}.png")
    np.savetxt(
        root / "AAM_landmarks" / subject / sequence / f"{stem}_aam.txt", FACE + np.array([shift, 0]), fmt="%16.7e"
    )
    (root / "Frame_Labels/PSPI" / subject / sequence / f"{stem}_facs.txt").write_text(f"   {label:.7e}\n")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Subject i has one sequence with frames of labels i and i + 0.5."""
    for label, subject in enumerate(SUBJECTS):
        for number in (1, 2):
            write_frame(tmp_path / "pain", subject, f"{subject[4:]}t1aaaff", number, label + 0.5 * (number - 1))
    return tmp_path


def labels(data: DataSet) -> tuple[list[float], list[float]]:
    return data.train.targets[:, 0].tolist(), data.test.targets[:, 0].tolist()


def test_data_set(archive: Path) -> None:
    data = load_pain(archive, test_subjects=1)
    assert (data.name, data.source, data.task, data.num_outputs) == (
        "pain",
        "partial: 8 of 48,398 frames",
        "regression",
        1,
    )
    crops, landmarks = data.train.inputs
    assert (crops.shape, crops.dtype) == ((6, 3, CROP, CROP), torch.uint8)
    assert (landmarks.shape, landmarks.dtype) == ((6, 66, 2), torch.float32)
    assert (data.train.targets.shape, data.train.targets.dtype) == ((6, 1), torch.float32)
    faces = data.to_input(data.train.inputs, True)
    assert (faces.shape[1:], faces.dtype) == (data.input_size, torch.float32)


def test_an_archive_with_all_frames_is_full(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tkn.data.pain.FULL_COUNT", 8)
    assert load_pain(archive, test_subjects=1).source == "full"


def test_last_subjects_are_for_testing(archive: Path) -> None:
    assert labels(load_pain(archive, test_subjects=1)) == ([0, 0.5, 1, 1.5, 2, 2.5], [3, 3.5])
    assert labels(load_pain(archive, test_subjects=3)) == ([0, 0.5], [1, 1.5, 2, 2.5, 3, 3.5])


def test_named_subjects_are_for_testing(archive: Path) -> None:
    data = load_pain(archive, test_subjects=["047-jl047", "042-ll042"])
    assert labels(data) == ([1, 1.5, 3, 3.5], [0, 0.5, 2, 2.5])


def test_hidden_files_are_no_frames(archive: Path) -> None:
    (archive / "pain/Images/042-ll042/ll042t1aaaff/._ll042t1aaaff001.png").write_bytes(b"Finder")
    assert len(load_pain(archive, test_subjects=1).train) == 6


def test_same_subject_number_on_both_sides(archive: Path) -> None:
    write_frame(archive / "pain", "048-zz048", "zz048t1aaaff", 1, 0)
    with pytest.raises(ValueError, match=r"048-aa048 \(training\) and 048-zz048 \(test\) are the same subject"):
        load_pain(archive, test_subjects=1)
    assert len(load_pain(archive, test_subjects=2).test) == 3


def test_same_sequence_on_both_sides(archive: Path) -> None:
    write_frame(archive / "pain", "050-xx050", "jh043t1aaaff", 1, 0)
    with pytest.raises(ValueError, match=r"sequence jh043t1aaaff is under both 043-jh043 .* and 050-xx050"):
        load_pain(archive, test_subjects=1)
    assert len(load_pain(archive, test_subjects=["043-jh043", "050-xx050"]).test) == 3


@pytest.mark.parametrize("shift", [0.0, -20.0, 50.0])
def test_faces_are_warped_to_the_reference(archive: Path, shift: float) -> None:
    """The picture holds its own coordinates; a face that leaves it goes on with the border's."""
    write_frame(archive / "pain", "042-ll042", "ll042t1aaaff", 1, 0, shift)
    data = load_pain(archive, test_subjects=1)
    faces = 255 * data.to_input(data.train.select(slice(0, 1)).inputs, False)
    centres = (torch.arange(48) + 0.5) / 48
    _, inside = pixel_weights(PAIN_FACE, 48, torch.float32, torch.device("cpu"))
    x = (10 + 60 * centres + shift - 0.5).clamp(0, SIZE[0] - 1).expand(48, 48) * inside
    y = (15 + 50 * centres - 0.5)[:, None].expand(48, 48) * inside
    torch.testing.assert_close(faces[0, :2], torch.stack([x, y]), rtol=0, atol=1)


def test_augmentation_is_for_training_only(archive: Path) -> None:
    data = load_pain(archive, test_subjects=1)
    plain = data.to_input(data.train.inputs, False)
    assert torch.equal(plain, data.to_input(data.train.inputs, False))
    torch.manual_seed(0)
    first, second = (data.to_input(data.train.inputs, True) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, data.to_input(data.train.inputs, True))
    assert torch.equal(plain, WarpFaces(0, False)(data.train.inputs, True))


def test_flip_is_for_half_of_the_faces(archive: Path) -> None:
    data = load_pain(archive, test_subjects=1, landmark_noise=0)
    batch = tuple(tensor[:1].expand(200, *tensor.shape[1:]) for tensor in data.train.inputs)
    plain = data.to_input(batch, False)
    torch.manual_seed(0)
    faces = data.to_input(batch, True)
    flipped = (faces != plain).flatten(1).any(dim=1)
    assert torch.equal(faces[flipped], plain[flipped].flip(-1))
    assert 70 < flipped.sum() < 130


def test_noise_is_a_fraction_of_the_face(archive: Path) -> None:
    """Measured where the warped picture, which holds its own coordinates, has a pixel at nearly a landmark."""
    data = load_pain(archive, test_subjects=1, landmark_noise=0.02, flip=False)
    batch = tuple(tensor[:1].expand(500, *tensor.shape[1:]) for tensor in data.train.inputs)
    torch.manual_seed(0)
    x, y = 255 * data.to_input(batch, True)[:, :2].flatten(2).permute(1, 0, 2)
    weights, _ = pixel_weights(PAIN_FACE, 48, torch.float32, torch.device("cpu"))
    pixel = weights[:, 30].argmax()  # the nose's tip
    expected = 0.02 * weights[pixel].norm().item()
    assert x[:, pixel].std().item() == pytest.approx(60 * expected, rel=0.15)
    assert y[:, pixel].std().item() == pytest.approx(50 * expected, rel=0.15)


def test_missing_archive(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pain.Images: .*expected here.*request it from its owners"):
        load_pain(tmp_path)


FRAME = "042-ll042/ll042t1aaaff/ll042t1aaaff002"


@pytest.mark.parametrize(
    ("file", "noun"), [("AAM_landmarks/{}_aam.txt", "landmarks"), ("Frame_Labels/PSPI/{}_facs.txt", "pain label")]
)
def test_frame_without_its_files(archive: Path, file: str, noun: str) -> None:
    (archive / "pain" / file.format(FRAME)).unlink()
    with pytest.raises(FileNotFoundError, match=rf"ll042t1aaaff002\.png: no {noun}, expected at .*ll042t1aaaff002_"):
        load_pain(archive, test_subjects=1)


LINES = [f"{x} {y}" for x, y in FACE.tolist()]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (LINES[:65], "65 landmarks, expected 66"),
        ([*LINES, "1 2", "3 4"], "68 landmarks, expected 66"),
        ([], "0 landmarks, expected 66"),
        ([*LINES[:65], "1 nose"], "two finite numbers"),
        ([*LINES[:65], "1 nan"], "two finite numbers"),
        ([*LINES[:65], "1"], "two finite numbers"),
        ([line + " 1" for line in LINES], "two finite numbers"),
    ],
)
def test_bad_landmarks(archive: Path, lines: list[str], message: str) -> None:
    (archive / f"pain/AAM_landmarks/{FRAME}_aam.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"ll042t1aaaff002_aam\.txt: .*{message}"):
        load_pain(archive, test_subjects=1)


def test_landmarks_off_the_picture(archive: Path) -> None:
    write_frame(archive / "pain", "042-ll042", "ll042t1aaaff", 2, 0, shift=200)
    with pytest.raises(ValueError, match=r"ll042t1aaaff002\.png: its landmarks do not span a face .* 100x80"):
        load_pain(archive, test_subjects=1)


@pytest.mark.parametrize("text", ["17", "-1", "nan", "", "1 2", "high"])
def test_bad_label(archive: Path, text: str) -> None:
    (archive / f"pain/Frame_Labels/PSPI/{FRAME}_facs.txt").write_text(text)
    with pytest.raises(
        ValueError, match=rf"ll042t1aaaff002_facs\.txt: pain label '{text}', expected one number of 0-16"
    ):
        load_pain(archive, test_subjects=1)


@pytest.mark.parametrize("keep", [0, 20, 100])
def test_undecodable_image(archive: Path, keep: int) -> None:
    path = archive / f"pain/Images/{FRAME}.png"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"ll042t1aaaff002\.png: cannot decode the image"):
        load_pain(archive, test_subjects=1)


def test_no_subject(tmp_path: Path) -> None:
    for kind in ("Images", "AAM_landmarks", "Frame_Labels/PSPI"):
        (tmp_path / "pain" / kind).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"Images: no subject"):
        load_pain(tmp_path)


@pytest.mark.parametrize(
    ("test_subjects", "message"),
    [
        (4, r"data\.test_subjects=4: .* the archive has 4 subjects"),
        (0, r"data\.test_subjects=0"),
        ([], r"data\.test_subjects=\[\]"),
        (SUBJECTS, r"data\.test_subjects=\['042-ll042', .*leave one for training"),
        (["043-jh34"], r"data\.test_subjects '043-jh34'; did you mean '043-jh043'"),
    ],
)
def test_impossible_test_subjects(archive: Path, test_subjects: int | list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pain(archive, test_subjects=test_subjects)


@pytest.mark.parametrize("source", ["full", "partial: 8 of 48,398 frames"])
def test_each_subject_is_in_one_fold(archive: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    if source == "full":
        monkeypatch.setattr("tkn.data.pain.FULL_COUNT", 8)
    pairs = []
    for fold in range(2):
        # What test_subjects says is not used, not even that it can't be.
        data = load_pain(archive, folds=2, fold=fold, seed=3, test_subjects=100)
        assert data.source == f"{source}, fold {fold} of 2, seed 3"
        assert not is_whole(data.source)
        assert read_fold(data.source) == Fold(fold, 2, f"{source}, 2 folds, seed 3")
        train, test = (sorted({int(label) for label in part}) for part in labels(data))
        assert (len(data.train), len(data.test)) == (4, 4)
        assert sorted([*train, *test]) == [0, 1, 2, 3]
        pairs.append(test)
    assert sorted([*pairs[0], *pairs[1]]) == [0, 1, 2, 3]
    # Alike: not the two subjects in the least pain in one fold.
    assert all(0 in pair or 1 in pair for pair in pairs)
    assert len({str(labels(load_pain(archive, folds=2, seed=seed))) for seed in range(6)}) > 1


def test_folders_of_one_subject_are_in_one_fold(archive: Path) -> None:
    write_frame(archive / "pain", "048-zz048", "zz048t1aaaff", 1, 10)  # the number of 048-aa048
    write_frame(archive / "pain", "050-xx050", "jh043t1aaaff", 1, 11)  # a sequence of 043-jh043's name
    write_frame(archive / "pain", "050-xx050", "xx050t1aaaff", 1, 12)
    seen = []
    for fold in range(4):
        _, test = labels(load_pain(archive, folds=4, fold=fold))
        seen += test
        assert (3 in test) == (3.5 in test) == (10 in test)
        assert (1 in test) == (1.5 in test) == (11 in test) == (12 in test)
    assert sorted(seen) == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 10, 11, 12]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 5}, r"data\.folds=5: the subjects to divide are only 4"),
        ({"folds": 1}, r"data\.folds=1 must be at least 2"),
        ({"folds": 3, "fold": 3}, r"data\.fold=3 must be 0 to 2, as data\.folds=3"),
        ({"fold": 1}, r"data\.fold=1 must be 0 without data\.folds"),
        ({"folds": 2, "seed": -1}, r"data\.seed=-1 must be in 0 - 4294967295"),
    ],
)
def test_impossible_folds(archive: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pain(archive, **options)


@pytest.mark.parametrize("noise", [-0.1, float("nan"), float("inf")])
def test_impossible_noise(archive: Path, noise: float) -> None:
    with pytest.raises(ValueError, match=r"data\.landmark_noise=.*: must be a number >= 0"):
        load_pain(archive, landmark_noise=noise)
