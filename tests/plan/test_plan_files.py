"""Plans in files: what was saved comes back, and anything else is refused."""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from engine_cases import assert_near, targeted, truth
from mutations import parts, whole
from plan_networks import NETWORKS, Untraceable, images, network
from torch import Tensor, nn
from torch.nn import functional as F

from tkn import AttentiveRegularization2d, TargetConv2d, accelerate, build_model, load_plan
from tkn.plan import file as plan_file
from tkn.plan.plan import Plan


def model() -> nn.Module:
    torch.manual_seed(0)
    return targeted(
        nn.Sequential(
            *(TargetConv2d(2, 18, 3, padding=1), nn.BatchNorm2d(18), nn.Mish(), nn.MaxPool2d(2)),
            *(TargetConv2d(18, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(45, 4), nn.Softmax(dim=1)),
        ),
        seed=1,
    ).eval()


def inputs(batch: int = 3) -> Tensor:
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
    assert loaded.fallbacks == plan.fallbacks == ("2 (Mish)", "8 (Softmax)")
    with torch.no_grad():
        expected = [truth(model())(inputs(batch).double()) for batch in (3, 20)]
    assert_near(loaded(inputs()), expected[0])
    assert_near(loaded(inputs(20)), expected[1])
    again = path.with_name("again.plan")
    loaded.save(str(again))
    assert_near(load_plan(str(again))(inputs()), expected[0])
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ("untraceable", "only torch")])
def test_every_network_that_can_be_saved(name: str, tmp_path: Path) -> None:
    plan = accelerate(network(name), 3, NETWORKS[name][1])
    plan.save(tmp_path / "net.plan")
    loaded = load_plan(tmp_path / "net.plan")
    assert loaded.fallbacks == plan.fallbacks
    for batch in (1, 3, 20):
        assert_near(loaded(images(name, batch)), truth(network(name))(images(name, batch).double()).detach())


def test_plans_of_one_dimension(tmp_path: Path) -> None:
    """Sizes of two numbers, where torch sees three axes."""
    plan, path = accelerate(network("one dimension"), 2, (3, 41)), tmp_path / "net.plan"
    plan.save(path)
    header, content, numbers = parts(path.read_bytes())
    assert content["input_size"] == [3, 41]
    sizes = {node["name"]: (node["size"], node["flat"]) for node in content["nodes"]}
    assert sizes["first"] == ([20, 21], False)
    assert sizes["mean"] == ([6, 1, 1], True)
    for changed, expected in (([20, 1, 21], "of one row"), ([20, 20], "its size is not"), ([20], "is no size")):
        content["nodes"][1]["size"] = changed
        path.write_bytes(whole(header, content, numbers))
        with pytest.raises(ValueError, match=expected):
            load_plan(path)


@pytest.mark.parametrize("name", ["stn", "tstn"])
def test_the_papers_spatial_transformers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = targeted(build_model(name, (3, 32, 32), 43), seed=1).eval()
    plan = accelerate(network, 2, (3, 32, 32))
    plan.save(tmp_path / "net.plan")
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        assert_near(
            load_plan(tmp_path / "net.plan")(x), truth(network)(x.double()), 1e-4
        )  # the sampling's own rounding


class Shuffle(nn.Module):
    """What real networks leave to torch: shapes, arithmetic with them, slices, and constants."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = TargetConv2d(2, 8, 3, padding=1)
        self.gamma = nn.Parameter(torch.rand(8, 1, 1))
        self.norm = nn.LayerNorm(8)
        self.attention = AttentiveRegularization2d(8, attention="gaussian", rho=0.3, clip=True)
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        b, c, h, w = x.size()
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)
        first, second = x.chunk(2, dim=1)
        x = torch.cat((second, first), dim=1) * self.gamma
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = F.silu(F.pad(x, (1, 0, 0, 1), mode="reflect"), inplace=True)
        x = self.attention(x + x.mean((2, 3), keepdim=True).sigmoid())
        return self.last(F.interpolate(x[:, :, ::2, 1:], scale_factor=2.0, mode="bilinear", align_corners=False))


def test_calls_of_torch_come_back_with_their_arguments(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = targeted(Shuffle(), seed=1).eval()
    accelerate(network, 2, (2, 8, 8)).save(tmp_path / "net.plan")
    for batch in (1, 2, 9):
        x = torch.randn(batch, 2, 8, 8)
        with torch.no_grad():
            assert_near(load_plan(tmp_path / "net.plan")(x), truth(network)(x.double()))


def test_a_file_is_data() -> None:
    """Two JSON texts and numbers, which nothing but JSON and safetensors read."""
    data = accelerate(model(), 3, (2, 7, 6))._bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    content = json.loads(header["__metadata__"]["tkn.plan"])
    assert (content["format"], content["version"]) == ("tkn.plan", 2)
    assert [node["operation"] for node in content["nodes"]][:4] == ["input", "convolve", "affine", "call"]
    kinds = {tensor["dtype"] for name, tensor in header.items() if name != "__metadata__"}
    assert kinds == {"F32", "F64"}
    numbers = sum(parameter.numel() for parameter in model().parameters())
    assert len(data) < 8 * numbers + 10_000  # no lists


def test_notes_for_users_of_the_file(tmp_path: Path) -> None:
    notes = {
        "classes": ["cat", "dog", "émeu", "\u2603"],
        "preprocessing": {"mean": [0.5, 0.25], "size": [7, 6], "x": None},
    }
    plan = accelerate(model(), 3, (2, 7, 6), **notes)
    assert (plan.classes, plan.preprocessing) == tuple(notes.values())
    plan.save(tmp_path / "net.plan")
    loaded = load_plan(tmp_path / "net.plan")
    assert (loaded.classes, loaded.preprocessing) == tuple(notes.values())
    notes["classes"].append("later")
    assert len(plan.classes) == 4
    lazy = accelerate(model(), 3, classes="any")
    lazy(inputs())
    assert (lazy.classes, lazy.preprocessing) == ("any", None)


def test_one_file_serves_every_batch_size(tmp_path: Path) -> None:
    plan = accelerate(model(), 3, (2, 7, 6))
    plan.save(tmp_path / "net.plan")
    expected = plan(inputs())
    for size in (1, 40):
        loaded = load_plan(tmp_path / "net.plan", batch_size=size)
        assert loaded.batch_size == size
        assert_near(loaded(inputs()), expected)
    assert load_plan(tmp_path / "net.plan").batch_size == 3
    for wrong in (0, True, 1.5):
        with pytest.raises(ValueError, match=r"batch_size=.* must be a whole number, at least 1"):
            load_plan(tmp_path / "net.plan", batch_size=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value",
    [{1, 2}, torch.zeros(1), float("nan"), {"a": object()}],
    ids=["set", "tensor", "nan", "object"],
)
def test_notes_that_are_no_json(value: object) -> None:
    with pytest.raises(ValueError, match="preprocessing must be a JSON value"):
        accelerate(model(), 3, (2, 7, 6), preprocessing=value)


def test_notes_that_are_too_long(tmp_path: Path) -> None:
    plan = accelerate(model(), 3, (2, 7, 6), classes=["x" * 100] * 20_000)
    with pytest.raises(ValueError, match=r"its description takes [0-9]+ bytes"):
        plan.save(tmp_path / "net.plan")


def untraceable() -> nn.Module:
    torch.manual_seed(0)
    return targeted(
        nn.Sequential(TargetConv2d(2, 6, 3), nn.LPPool2d(2, 2), Untraceable(), nn.Conv2d(6, 4, 1)), seed=1
    ).eval()


def test_what_files_can_not_hold_is_named(tmp_path: Path) -> None:
    plan = accelerate(untraceable(), 3, (2, 7, 6))
    message = "a file can't hold what torch runs in 1 (LPPool2d), 2 (Untraceable)"
    for write in (lambda: plan.save(tmp_path / "net.plan"), lambda: copy.deepcopy(plan), lambda: pickle.dumps(plan)):
        with pytest.raises(ValueError, match=re.escape(message)):
            write()
    assert not list(tmp_path.iterdir())


class WritesIntoAnother(nn.Module):
    """Reads what an operation in place has changed: out of place it would be another network."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(2, 3, 3), act

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).sigmoid()
        return self.act(x) * x


def test_operations_in_place(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = WritesIntoAnother(nn.Mish(inplace=True))
    plan = accelerate(network, 3, (2, 7, 6))
    with torch.no_grad():
        assert_near(plan(inputs()), network(inputs()))
    with pytest.raises(ValueError, match=r"a file can't hold what torch runs in act \(Mish\)"):
        plan.save(tmp_path / "net.plan")
    plain = nn.Sequential(nn.Conv2d(2, 3, 3), nn.SiLU(inplace=True), nn.Hardswish(inplace=True))
    for known in (plain, WritesIntoAnother(nn.SiLU(inplace=True))):
        accelerate(known, 3, (2, 7, 6)).save(tmp_path / "net.plan")
        with torch.no_grad():
            assert_near(load_plan(tmp_path / "net.plan")(inputs()), known(inputs()))


def test_shared_weights_are_kept_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 32, 3, padding=1)
    accelerate(nn.Sequential(conv, nn.ReLU(), conv), 2, (32, 5, 5)).save(tmp_path / "net.plan")
    assert (tmp_path / "net.plan").stat().st_size < 1.5 * 4 * conv.weight.numel()
    x = torch.rand(2, 32, 5, 5)
    with torch.no_grad():
        assert_near(load_plan(tmp_path / "net.plan")(x), conv(conv(x).relu()))


def test_a_plan_made_at_its_first_call(tmp_path: Path) -> None:
    plan = accelerate(model(), 3)
    plan(inputs())
    plan.save(tmp_path / "net.plan")
    assert_near(load_plan(tmp_path / "net.plan")(inputs()), plan(inputs()))


def test_saving_replaces_the_file_whole(plan: Plan, path: Path) -> None:
    path.write_bytes(b"old")
    plan.save(path)
    assert_near(load_plan(path)(inputs()), plan(inputs()))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_failed_save_leaves_the_old_file(plan: Plan, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        plan.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_folders_that_can_not_be_written(plan: Plan, path: Path) -> None:
    for folder in (path, path.parent / "absent"):
        with pytest.raises(OSError, match=r"absent|net"):
            plan.save(folder / "net.plan")


def test_absent_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_plan(tmp_path / "absent.plan")


@pytest.mark.parametrize("share", [0, 0.001, 0.02, 0.5, 0.99])
def test_truncated_files(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"net\.plan is damaged or not a plan"):
        load_plan(path)


@pytest.mark.parametrize("kind", ["text", "image", "folder", "weights"])
def test_foreign_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "foreign.plan"
    if kind == "folder":
        path.mkdir()
    elif kind == "weights":
        safetensors.torch.save_file(model().state_dict(), path)
    else:
        path.write_bytes(b"a plan\n" if kind == "text" else b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(ValueError, match=r"foreign\.plan is (not a plan|damaged or not a plan|a folder)"):
        load_plan(path)


def test_plans_of_other_versions(plan: Plan, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"format": 1, "graph": None, "batch_size": 3}, path)
    with pytest.raises(ValueError, match=r"net\.plan is a plan of an earlier version.*anew with tkn\.accelerate"):
        load_plan(path)
    for version, message in ((1, "an earlier version .*anew with tkn.accelerate"), (3, "a newer version .*newer tkn")):
        with monkeypatch.context() as patched:
            patched.setattr(plan_file, "_VERSION", version)
            plan.save(path)
        with pytest.raises(ValueError, match=message):
            load_plan(path)


def test_a_moved_file_is_the_same_plan(plan: Plan, path: Path, tmp_path: Path) -> None:
    shutil.move(path, tmp_path / "moved")
    assert_near(load_plan(tmp_path / "moved")(inputs()), plan(inputs()))


def test_a_file_that_is_overwritten_does_not_change_a_loaded_plan(plan: Plan, path: Path) -> None:
    loaded = load_plan(path)
    with path.open("r+b") as file:
        file.truncate(100)
    assert_near(loaded(inputs()), plan(inputs()))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))], ids=["copy", "pickle"]
)
def test_copies_are_plans(copied: object) -> None:
    plan = accelerate(model(), 3, (2, 7, 6), classes=["a", "b", "c", "d"])
    expected = plan(inputs())
    other = copied(plan)
    assert isinstance(other, Plan)
    assert (other.batch_size, other.classes, other.fallbacks) == (3, ["a", "b", "c", "d"], plan.fallbacks)
    assert_near(other(inputs()), expected)
    sequence = copied(nn.Sequential(plan, nn.Softmax(dim=1)))
    assert_near(sequence(inputs()), expected.softmax(1))


def test_plans_that_are_not_made_yet_are_not_copied() -> None:
    with pytest.raises(ValueError, match="made at its first use"):
        copy.deepcopy(accelerate(model(), 3))


def test_a_fresh_process_loads_it_without_pickles(path: Path, plan: Plan) -> None:
    code = f"""
import pickle, sys
import torch, tkn
def refuse(*args, **kwargs):
    raise AssertionError("unpickled")
pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse
plan = tkn.load_plan({str(path)!r})
assert "torch._dynamo" not in sys.modules, "which takes seconds"
print(plan(torch.ones(1, 2, 7, 6)).tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_near(torch.tensor(json.loads(done.stdout.splitlines()[-1])), plan(torch.ones(1, 2, 7, 6)))
