"""The command tkn-run: Hydra around `tkn.run`, with errors of one line."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig

from tkn.suggest import unknown

_log = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parent
#: In a wheel the configs lie inside the package, in a checkout beside it.
CONFIG_DIR = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())

FULL_ERROR = "HYDRA_FULL_ERROR"


def main() -> None:
    """Run tkn-run on the process's arguments; exit status 1 and one line on stderr if it fails."""
    traceback_wanted = os.environ.get(FULL_ERROR) == "1"
    # Hydra would print tracebacks and exit; so it hands exceptions on to here.
    os.environ[FULL_ERROR] = "1"
    failures: list[Exception] = []

    def task(config: DictConfig) -> None:
        from tkn.training.run import run

        try:
            run(config)
        except Exception as error:
            job = HydraConfig.get()
            if job.mode == RunMode.MULTIRUN:
                # Logged at once, and raised for the launcher: it goes on to the other runs and fails at the end.
                _log.error("run %s (%s) failed: %s", job.job.num, job.job.override_dirname, one_line(error))
                raise
            failures.append(error)

    try:
        _check_overrides(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")(task)()
        if failures:
            raise failures[0]
    except KeyboardInterrupt:
        sys.exit("tkn-run: interrupted")
    except Exception as error:
        if traceback_wanted:
            raise
        sys.exit(f"tkn-run: error: {one_line(error)}")


def compose(*overrides: str) -> DictConfig:
    """The configuration that tkn-run would make of these arguments, for `tkn.run`: compose("model=dn10", "seed=1").

    ValueError with the nearest valid name for an unknown one.
    """
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3", job_name="tkn-run"):
        return _compose(list(overrides))


def one_line(error: BaseException) -> str:
    """An error's message in one line; the names of unexpected kinds are kept, with the way to see more."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ValueError | OSError | HydraException):
        return text
    return f"{type(error).__name__}: {text} ({FULL_ERROR}=1 shows the traceback)"


def _check_overrides(arguments: list[str]) -> None:
    """Compose the configuration before Hydra makes a folder for it; ValueError with the nearest valid name."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    if set(flags) - {"-m", "--multirun"}:
        return  # another command of Hydra's, such as --help
    overrides = [argument for argument in arguments if argument not in flags]
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3", job_name="tkn-run"):
        for combination in _combinations(overrides):
            config = _compose(combination)
        if not flags:
            from tkn.training.config import check_config

            # A bad value in a sweep fails its own run only.
            check_config(config)


def _combinations(overrides: list[str]) -> list[list[str]]:
    """Lists of overrides without sweeps in which every value of every sweep occurs."""
    loader = GlobalHydra.instance().config_loader()
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(overrides)
    choices = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_discrete_sweep()
        else [override.input_line or ""]
        for override in parsed
        if not override.is_sweep_override() or override.is_discrete_sweep()
    ]
    first = [options[0] for options in choices]
    return [first] + [
        [*first[:position], option, *first[position + 1 :]]
        for position, options in enumerate(choices)
        for option in options[1:]
    ]


def _compose(overrides: list[str]) -> DictConfig:
    try:
        return hydra.compose("config", overrides=overrides)
    except MissingConfigException as error:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        if not error.options:
            raise
        raise ValueError(unknown(group or "config", name, error.options)) from error
    except ConfigCompositionException as error:
        match = re.search(r"Could not (?:override|delete[^']*) '([^']+)'", str(error))
        if match is None:
            raise
        key = match[1].split("@")[0]
        rest = [override for override in overrides if not override.lstrip("+~").startswith(match[1])]
        raise ValueError(unknown("key", key, _known_keys(hydra.compose("config", overrides=rest)))) from error


def _known_keys(config: DictConfig) -> list[str]:
    """All keys of the configuration, groups included, as they are written on the command line."""
    keys: list[str] = []

    def walk(node: DictConfig, prefix: str) -> None:
        for key in map(str, node):
            keys.append(f"{prefix}{key}")
            value = node._get_node(key)
            if isinstance(value, DictConfig) and not value._is_none():
                walk(value, f"{prefix}{key}.")

    walk(config, "")
    return keys
