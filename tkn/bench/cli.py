"""The command tkn-bench: Hydra around `tkn.bench.run.bench`."""

from __future__ import annotations

from collections.abc import Callable

from omegaconf import DictConfig

from tkn.app.command import CONFIG_DIR, Command

TKN_BENCH = Command("tkn-bench", CONFIG_DIR / "bench")


def main() -> None:
    """Run tkn-bench on the process's arguments; exit status 1 and one line on stderr if it fails (130 on Ctrl-C)."""
    TKN_BENCH.main(_load_run, _load_check)


def compose(*overrides: str) -> DictConfig:
    """The configuration that tkn-bench would make of these arguments, for `bench`: compose("case=tkn6_mnist").

    ValueError with the nearest valid name for an unknown one.
    """
    return TKN_BENCH.compose(*overrides)


def _load_run() -> Callable[[DictConfig], object]:
    from tkn.bench.run import bench

    return bench


def _load_check() -> Callable[[DictConfig], object]:
    from tkn.bench.config import check_config

    return check_config
