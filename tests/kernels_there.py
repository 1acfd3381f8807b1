"""The kernels' cache for tests of the engine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tkn.backends.cpu import build


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    """Every test finds the kernels there.

    Two workers compile one type each, where all that ask this package for kernels wait for the one that compiles.
    """
    names = ["float32", "float64"]
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0") != "gw0":
        names.reverse()
    for name in names:
        with FileLock(build.cache_dir() / f"{name}.lock"):
            if not build.checked_mark(getattr(torch, name)).is_file():
                assert build.run_in_child("tkn.backends.cpu.check", name) is None
    assert build.available(torch.float32)
    assert build.available(torch.float64)


@pytest.fixture
def fresh_check(tmp_path: Path) -> str:
    """A cache folder of compiled kernels that were never checked."""
    for folder in Path(os.environ[build.CACHE_VARIABLE]).glob("tkn_engine_*"):
        if folder.name.endswith((build.fingerprint(torch.float32), build.fingerprint(torch.float64))):
            shutil.copytree(folder, tmp_path / folder.name)  # with the times of the files: ninja has nothing to do
            (tmp_path / folder.name / "checked").unlink()
    return str(tmp_path)
