"""Compiling the kernels at first use: once, kept, checked; and torch where that fails."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_cases import assert_near, engine_of, new_python, python, targeted, truth
from torch import nn
from torch.utils.checkpoint import checkpoint

import tkn
from tkn import TargetConv2d, accelerate
from tkn.backends.cpu import build
from tkn.backends.cpu.build import EngineUnavailable
from tkn.sequential import TargetSequential

ROOT = Path(__file__).resolve().parents[2]
#: A program that computes by all ways that lead to the kernels, and says how far off they are and what was warned.
PROGRAM = """
import copy, json, tempfile, warnings
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tkn import TargetConv2d, accelerate, load_plan
from tkn.sequential import TargetSequential

torch.manual_seed(0)
model = TargetSequential(
    TargetConv2d(2, 20, 3, padding=1, engine="roi"), nn.ReLU(), nn.MaxPool2d(2),
    TargetConv2d(20, 6, 3, padding=1, engine="roi"), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3),
).eval()
for layer in model:
    if isinstance(layer, TargetConv2d):
        nn.init.uniform_(layer.loc, 0.2, 0.8)
        nn.init.uniform_(layer.scale, 0.2, 0.6)
torches = copy.deepcopy(model)
torches[0].engine = torches[3].engine = "dense"

def error(one, other):
    return float((one - other).detach().abs().max() / other.detach().abs().max())

def step(model, x):
    loss = model(x).square().mean()
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x = torch.rand(5, 2, 8, 8)
    errors = [error(model(x), torches(x)), error(model[0](x), torches[0](x))]
    errors += [error(one, other) for one, other in zip(step(model, x), step(torches, x))]
    for batch in (5, 40):
        errors.append(error(accelerate(model, batch, (2, 8, 8))(x), torches(x)))
    plan = accelerate(model, 5)
    errors.append(error(plan(x), torches(x)))
    with tempfile.TemporaryDirectory() as folder:
        plan.save(f"{folder}/net.plan")
        errors.append(error(load_plan(f"{folder}/net.plan")(x), torches(x)))
    auto = TargetConv2d(32, 32, 5, padding=2)
    nn.init.constant_(auto.scale, 0.3)
    big = torch.rand(4, 32, 12, 12)
    errors.append(error(auto(big), auto.dense(big)))
y = model[0](x)  # its grad_fn has a name as long as it is there
grad_fn = y.grad_fn.name()
print(json.dumps({"errors": errors, "warnings": [str(w.message) for w in caught], "roi": "InRois" in grad_fn}))
"""


def test_without_a_compiler(tmp_path: Path) -> None:
    said = python(PROGRAM, TKN_CACHE_DIR=str(tmp_path / "cache"), CXX="/nonexistent/compiler")
    assert max(said["errors"]) < 1e-5
    assert not said["roi"]
    (warning,) = said["warnings"]
    assert "the ROI engine is not available, torch computes instead" in warning
    assert "could not be compiled" in warning


def test_with_an_environment_that_is_not_activated(tmp_path: Path) -> None:
    """The package ninja is installed; its program need not be on the path."""
    folders = [folder for folder in os.environ["PATH"].split(os.pathsep) if not (Path(folder) / "ninja").exists()]
    (tmp_path / "bin").mkdir()
    for tool in ("c++", "g++", "gcc", "cc", "as", "ld"):  # which may lie beside a system's ninja
        found = shutil.which(tool)
        if found is not None:
            (tmp_path / "bin" / tool).symlink_to(found)
    path = os.pathsep.join([*folders, str(tmp_path / "bin")])
    said = python(PROGRAM, TKN_CACHE_DIR=str(tmp_path / "cache"), PATH=path, TKN_ENGINE_CFLAGS="-O0")
    assert said["warnings"] == []
    assert said["roi"]
    assert max(said["errors"]) < 1e-5


def test_a_cache_folder_that_can_not_be_written(tmp_path: Path) -> None:
    """The kernels are compiled for this process alone, and leave nothing behind."""
    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    folders = {"TKN_CACHE_DIR": str(tmp_path / "file" / "cache"), "TMPDIR": str(tmp_path / "temporary")}
    said = new_python(PROGRAM, TKN_ENGINE_CFLAGS="-O0", **folders)
    assert max(said["errors"]) < 1e-5
    assert said["roi"]
    assert said["warnings"] == []
    assert (tmp_path / "file").read_text() == ""
    assert not list((tmp_path / "temporary").iterdir())


def test_compiled_kernels_are_found_again(tmp_path: Path) -> None:
    """In another process, which could not compile them."""
    cache = Path(os.environ["TKN_CACHE_DIR"])
    for folder in cache.glob("tkn_engine_*"):
        if folder.name.endswith(build.fingerprint(torch.float32)):
            shutil.copytree(folder, tmp_path / folder.name)
    said = python(
        PROGRAM.replace("import torch\n", "import torch, torch.utils.cpp_extension\n" + FORBID, 1),
        TKN_CACHE_DIR=str(tmp_path),
    )
    assert said["roi"]
    assert said["warnings"] == []
    assert max(said["errors"]) < 1e-5


FORBID = """
def refuse(*args, **kwargs):
    raise AssertionError("compiled again")
torch.utils.cpp_extension.load = refuse
"""


@pytest.mark.parametrize("content", [b"", b"no library"])
def test_a_damaged_library_is_not_the_users_problem(tmp_path: Path, content: bytes) -> None:
    """It is compiled again, or torch computes."""
    for folder in Path(os.environ["TKN_CACHE_DIR"]).glob("tkn_engine_float_*"):
        if folder.name.endswith(build.fingerprint(torch.float32)):
            shutil.copytree(folder, tmp_path / folder.name)
            (tmp_path / folder.name / f"{folder.name}.so").write_bytes(content)
    said = python(PROGRAM, TKN_CACHE_DIR=str(tmp_path), CXX=os.environ.get("CXX", ""))
    assert max(said["errors"]) < 1e-5
    assert len(said["warnings"]) <= 1


@pytest.fixture
def unopened(monkeypatch: pytest.MonkeyPatch, fresh_check: str) -> Path:
    """As in a new process that finds compiled kernels which were not checked."""
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "_unavailable", {})
    monkeypatch.setenv("TKN_CACHE_DIR", fresh_check)
    return Path(fresh_check)


def test_the_check_is_passed_once(unopened: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.available(torch.float32)
    assert len(list(unopened.glob("*/checked"))) == 1
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "run_in_child", lambda *_: pytest.fail("checked again"))
    assert build.available(torch.float32)


@pytest.mark.filterwarnings("always")
def test_a_failing_check_leaves_no_kernels(
    unopened: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """One warning, and torch's results; the next question must not be answered with kernels that passed no check."""
    monkeypatch.setattr(build, "run_in_child", lambda *_: "the check failed")
    torch.manual_seed(0)
    model = TargetSequential(TargetConv2d(2, 18, 3, padding=1), nn.ReLU())
    targeted(model, seed=1, engine="roi")
    x = torch.rand(3, 2, 8, 8)
    for _ in range(2):
        assert engine_of(model(x)) == "dense"
    assert_near(model(x), truth(model)(x.double()))
    assert_near(accelerate(model, 3, (2, 8, 8))(x), truth(model)(x.double()))
    (warning,) = recwarn
    assert str(warning.message).endswith("torch computes instead (same results, slower): the check failed")
    with pytest.raises(EngineUnavailable, match="the check failed"):
        build.kernels(torch.float32)
    assert not list(unopened.glob("*/checked"))


def test_kernels_are_not_built_where_they_may_not(unopened: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkpointed region, in a backward pass: torch computes, and a later call may build them."""
    monkeypatch.setattr(build, "run_in_child", lambda *_: pytest.fail("built"))
    torch.manual_seed(0)
    layer = targeted(TargetConv2d(2, 4, 3, padding=1, engine="roi"), seed=1)
    x = torch.rand(3, 2, 8, 8, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=False)
    y.sum().backward()
    assert_near(y, truth(layer)(x.double()))
    seen: list[str] = []

    def compute(_grad: torch.Tensor) -> None:
        with torch.enable_grad():
            seen.append(engine_of(layer(x)))

    x.register_hook(compute)
    (x * 2).sum().backward()
    assert seen == ["dense"]
    assert unopened.is_dir()
    assert not build._unavailable


BROKEN = {
    "computes wrongly": ("return v < V{} ? V{} : v;", "return v;", "compute wrongly"),
    "is no instruction of this CPU": (
        "namespace {\n",
        "namespace {\n__attribute__((constructor)) void trap() { __builtin_trap(); }\n",
        "their check was ended by SIG",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_kernels_that_must_not_run_are_refused(name: str, tmp_path: Path) -> None:
    """A copy of the package whose kernels are broken: a warning, torch's results, and no process that ends."""
    right, wrong, expected = BROKEN[name]
    shutil.copytree(Path(tkn.__file__).parent, tmp_path / "tkn", ignore=shutil.ignore_patterns("__pycache__"))
    vector = tmp_path / "tkn" / "backends" / "cpu" / "csrc" / "vector.h"
    assert right in vector.read_text()
    vector.write_text(vector.read_text().replace(right, wrong, 1))
    cache = tmp_path / "cache"
    said = new_python(PROGRAM, tmp_path, TKN_CACHE_DIR=str(cache), PYTHONPATH="", TKN_ENGINE_CFLAGS="-O0")
    assert max(said["errors"]) < 1e-5
    assert not said["roi"]
    assert expected in said["warnings"][0]
    assert len(said["warnings"]) == 1
    assert list(cache.glob("*/*.so"))
    assert not list(cache.glob("*/checked"))


def test_builds_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {build.fingerprint(torch.float32), build.fingerprint(torch.float64)}
    monkeypatch.setenv("TKN_ENGINE_CFLAGS", "-O1")
    names.add(build.fingerprint(torch.float32))
    monkeypatch.setenv("CXX", "other")
    names.add(build.fingerprint(torch.float32))
    monkeypatch.setattr(build, "_cpu", lambda: "another CPU")
    names.add(build.fingerprint(torch.float32))
    assert len(names) == 5


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert ".pytest_cache" in os.environ["TKN_CACHE_DIR"] or "/d/tkn" in os.environ["TKN_CACHE_DIR"]
    monkeypatch.setenv("TKN_CACHE_DIR", str(tmp_path))
    assert build.cache_dir() == tmp_path
    monkeypatch.delenv("TKN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert build.cache_dir() == tmp_path / "cache" / "tkn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert build.cache_dir() == tmp_path / "home" / ".cache" / "tkn"


def test_there_are_no_kernels_for_other_types() -> None:
    assert not build.available(torch.bfloat16)
    with pytest.raises(EngineUnavailable, match=r"no kernels for torch\.bfloat16"):
        build.kernels(torch.bfloat16)


def test_narrower_vectors(pytestconfig: pytest.Config) -> None:
    """The compact tests with the kernels of another CPU: AVX2's, where this one has AVX-512."""
    flags = "-mno-avx512f" if platform.machine() in ("x86_64", "AMD64") else "-O2"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-m", "compact", "--no-header"),
            *("-o", f"cache_dir={pytestconfig.cache.mkdir('narrow')}", str(Path(__file__).parent)),
        ],
        cwd=ROOT,
        env={**os.environ, "TKN_ENGINE_CFLAGS": flags, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
