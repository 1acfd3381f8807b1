"""Versions of what results depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


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
