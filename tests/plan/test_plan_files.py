"""Plans in files: what was saved comes back, and anything else is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from engine_cases import assert_near, targeted, truth
from test_plan import Untraceable
from torch import Tensor, nn

from tkn import TargetConv2d, accelerate, load_plan
from tkn.plan.plan import Plan


def model() -> nn.Module:
    torch.manual_seed(0)
    return targeted(
        nn.Sequential(
            *(TargetConv2d(2, 18, 3, padding=1), nn.BatchNorm2d(18), nn.GELU(), nn.MaxPool2d(2), Untraceable()),
            *(TargetConv2d(18, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(45, 4), nn.Softmax(dim=1)),
        ),
        seed=1,
    ).eval()


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 2, 7, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def plan() -> Plan:
    return accelerate(model(), 3, (2, 7, 6))


@pytest.fixture
def path(plan: Plan, tmp_path: Path) -> Path:
    plan.save(tmp_path / "net.plan")
    return tmp_path / "net.plan"


def test_what_was_saved_comes_back(plan: Plan, path: Path) -> None:
    loaded = load_plan(path)
    assert (loaded.batch_size, loaded.input_size) == (3, (2, 7, 6))
    assert loaded.fallbacks == plan.fallbacks == ("2 (GELU)", "4 (Untraceable)", "9 (Softmax)")
    with torch.no_grad():
        expected = [truth(model())(images(batch).double()) for batch in (3, 20)]
    assert_near(loaded(images()), expected[0])
    assert_near(loaded(images(20)), expected[1])
    again = path.with_name("again.plan")
    loaded.save(str(again))
    assert_near(load_plan(str(again))(images()), expected[0])


def test_a_plan_made_at_its_first_call(tmp_path: Path) -> None:
    plan = accelerate(model(), 3)
    plan(images())
    plan.save(tmp_path / "net.plan")
    assert_near(load_plan(tmp_path / "net.plan")(images()), plan(images()))


def test_saving_replaces_the_file_whole(plan: Plan, path: Path) -> None:
    path.write_bytes(b"old")
    plan.save(path)
    assert_near(load_plan(path)(images()), plan(images()))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_failed_save_leaves_the_old_file(plan: Plan, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        plan.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_folders_that_can_not_be_written(plan: Plan, path: Path) -> None:
    for folder in (path, path.parent / "absent"):
        with pytest.raises((OSError, RuntimeError)):
            plan.save(folder / "net.plan")


def test_absent_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_plan(tmp_path / "absent.plan")


@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.99])
def test_truncated_files(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"net\.plan is damaged or not a plan"):
        load_plan(path)


def test_files_with_other_bytes(path: Path) -> None:
    """Whatever is damaged, a ValueError says so, or the numbers themselves are others."""
    content, random = path.read_bytes(), Random(0)
    for _ in range(30):
        damaged = bytearray(content)
        for at in random.sample(range(len(content)), 40):
            damaged[at] = random.randrange(256)
        path.write_bytes(damaged)
        try:
            loaded = load_plan(path)
        except ValueError:
            continue
        assert loaded.batch_size >= 1


@pytest.mark.parametrize("kind", ["text", "state_dict", "tensor", "other format", "no graph", "folder"])
def test_foreign_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "foreign.plan"
    if kind == "text":
        path.write_text("a plan\n")
    elif kind == "folder":
        path.mkdir()
    else:
        torch.save(
            {
                "state_dict": model().state_dict(),
                "tensor": torch.zeros(3),
                "other format": {"format": 99, "graph": None, "batch_size": 1},
                "no graph": {"format": 1, "state_dict": {}},
            }[kind],
            path,
        )
    with pytest.raises(ValueError, match=r"foreign\.plan is (not a plan|damaged or not a plan)"):
        load_plan(path)


def test_a_moved_file_is_the_same_plan(plan: Plan, path: Path, tmp_path: Path) -> None:
    shutil.move(path, tmp_path / "moved")
    assert_near(load_plan(tmp_path / "moved")(images()), plan(images()))
