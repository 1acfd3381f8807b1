"""The configurations of runs: what the arguments of tkn-run make of `conf/`."""

from __future__ import annotations

from omegaconf import DictConfig

from tkn.app.command import CONFIG_DIR, Command

TKN_RUN = Command("tkn-run", CONFIG_DIR, open_keys=("recipe.optimizer.", "data.options."))


def compose(*overrides: str) -> DictConfig:
    """The configuration that tkn-run would make of these arguments, for `tkn.run`: compose("model=dn10", "seed=1").

    ValueError with the nearest valid name for an unknown one.
    """
    return TKN_RUN.compose(*overrides)
