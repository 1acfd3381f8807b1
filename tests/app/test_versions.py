"""What a summary says of the project's own version."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from tkn.app import versions
from tkn.app.versions import project_commit


def _git(folder: Path, *arguments: str) -> str:
    person = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(folder), *person, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one commit, in the place of this project's."""
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    monkeypatch.setattr(versions, "_ROOT", tmp_path)
    (tmp_path / "tkn").mkdir()
    (tmp_path / "tkn" / "code.py").write_text("1")
    _git(tmp_path, "init", "--quiet")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "--quiet", "-m", "Begin")
    return tmp_path


def test_the_commit_and_whether_the_code_differs_from_it(checkout: Path) -> None:
    commit = _git(checkout, "rev-parse", "HEAD")
    (checkout / "results").mkdir()
    (checkout / "results" / "summary.json").write_text("{}")
    assert project_commit() == commit
    (checkout / "tkn" / "new.py").write_text("2")
    assert project_commit() == f"{commit}+changes"


def test_a_copy_that_is_installed_in_another_project_has_no_commit(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "_ROOT", checkout / "tkn")
    assert project_commit() is None


def test_a_checkout_reached_by_a_link(checkout: Path, tmp_path: Path) -> None:
    (checkout / "tkn" / "app").mkdir()
    shutil.copy(versions.__file__, checkout / "tkn" / "app")
    link = tmp_path / "link"
    link.symlink_to(checkout)
    spec = importlib.util.spec_from_file_location("linked_versions", link / "tkn" / "app" / "versions.py")
    assert spec is not None
    assert spec.loader is not None
    linked = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(linked)
    assert linked.project_commit() == f"{_git(checkout, 'rev-parse', 'HEAD')}+changes"


def test_no_commit_without_a_repository_or_without_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkout: Path
) -> None:
    shutil.rmtree(checkout / ".git")
    assert project_commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert project_commit() is None
