"""The command tkn-bench: Hydra around `tkn.bench.run.bench`."""

from __future__ import annotations

from collections.abc import Callable

from omegaconf import DictConfig

from tkn.app.command import CONFIG_DIR, Command


def _load_run() -> Callable[[DictConfig], object]:
    from tkn.bench.run import bench

    return bench


def _load_check() -> Callable[[DictConfig], object]:
    from tkn.bench.config import check_config

    return check_config


_COMMAND = Command("tkn-bench", CONFIG_DIR / "bench", _load_run, _load_check)


def main() -> None:
    """Run tkn-bench on the process's arguments; exit status 1 and one line on stderr if it fails (130 on Ctrl-C)."""
    _COMMAND.main()


def compose(*overrides: str) -> DictConfig:
    """The configuration that tkn-bench would make of these arguments, for `bench`: compose("case=tkn6_mnist").

    ValueError with the nearest valid name for an unknown one.
    """
    return _COMMAND.compose(*overrides)
