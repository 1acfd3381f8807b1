"""Versions of what results depend on."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]  # git's paths are without links
#: Where in a checkout the code is that a result depends on.
_CODE = ("tkn", "conf", "hydra_plugins")


def package_versions(*packages: str) -> dict[str, str]:
    """Versions of Python, this project ("tkn") and `packages`, by name; "not installed" where there is none."""
    names = {"tkn": "targeted-kernel-networks"} | {name: name for name in packages}
    versions = {"python": platform.python_version()}
    for short, package in names.items():
        try:
            versions[short] = version(package)
        except PackageNotFoundError:  # also this project, run from a checkout that was not installed
            versions[short] = "not installed"
    return versions


def project_commit() -> str | None:
    """The commit of the checkout that this code is in, with "+changes" where code or configurations differ from it.

    None for an installed copy, and where git can't say.
    """
    try:
        top, commit = _git("rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top) != _ROOT:  # another project's, in whose tree this one is installed
            return None
        return f"{commit}+changes" if _git("status", "--porcelain", "--", *_CODE) else commit
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
