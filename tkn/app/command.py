"""What the commands share: Hydra around a function, with errors of one line that name the nearest valid name."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from tkn.app.memory import keep_freed_memory
from tkn.app.messages import FULL_ERROR, error_line, unknown
from tkn.app.signals import Interrupted, interrupt

_log = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parents[1]
#: In a wheel the configs lie inside the package, in a checkout beside it.
CONFIG_DIR = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())

#: The extras that install Hydra's plugins, by the configurations that these bring along.
_EXTRAS = {
    "hydra/launcher/joblib": "sweep",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/submitit_slurm": "slurm",
    "hydra/launcher/ray": "ray",
}


#: Imports a function of a configuration, and returns it.
Loader = Callable[[], Callable[[DictConfig], object]]


@dataclass(frozen=True)
class Command:
    """A command, by its configuration: `config_dir`/config.yaml and its groups.

    open_keys: the beginnings of keys that users may add with a +.
    """

    name: str
    config_dir: Path
    open_keys: tuple[str, ...] = ()

    def main(self, load_run: Loader, load_check: Loader) -> None:
        """Hand the configuration that the process's arguments make to a function.

        Ends with one line on stderr and status 1 if that fails, 130 or 143 if it is stopped.

        load_run, load_check: import and return the function, and the one that raises ValueError for a wrong
            configuration; late, as importing them can take seconds. What the function returns is for the sweeper.
        """
        signal.signal(signal.SIGTERM, interrupt)
        traceback_wanted = os.environ.get(FULL_ERROR) == "1"
        # Hydra would print tracebacks and exit; so it hands exceptions on to here.
        os.environ[FULL_ERROR] = "1"
        failures: list[Exception] = []

        def task(config: DictConfig) -> object:
            keep_freed_memory()  # here, as a launcher may have started another process for it
            try:
                return run(config)
            except Exception as error:
                job = HydraConfig.get()
                if job.mode == RunMode.MULTIRUN:
                    # Raised for the launcher, which goes on to the other runs and fails at the end.
                    _log.error("run %s (%s) failed: %s", job.job.num, job.job.override_dirname, one_line(error))
                    raise
                # Not raised: Hydra would print more than the one line.
                _log_to_file(one_line(error))
                failures.append(error)
                return None

        try:
            self._check_overrides(sys.argv[1:], load_check)
            # Before Hydra configures logging, which importing Lightning undoes.
            run = load_run()
            hydra.main(version_base="1.3", config_path=str(self.config_dir), config_name="config")(task)()
            if failures:
                raise failures[0]
        except (KeyboardInterrupt, Interrupted) as stop:
            print(f"{self.name}: {str(stop) or 'interrupted'}", file=sys.stderr)
            sys.exit(stop.exit_code if isinstance(stop, Interrupted) else 130)
        except Exception as error:
            if traceback_wanted:
                raise
            sys.exit(f"{self.name}: error: {one_line(error)}")

    def compose(self, *overrides: str) -> DictConfig:
        """The configuration that the command would make of these arguments; ValueError with the nearest valid name."""
        with hydra.initialize_config_dir(str(self.config_dir), version_base="1.3", job_name=self.name):
            return self._compose(list(overrides))

    def _check_overrides(self, arguments: list[str], load_check: Loader) -> None:
        """Compose the configuration before Hydra makes a folder for it; ValueError with the nearest valid name."""
        flags = [argument for argument in arguments if argument.startswith("-")]
        if set(flags) - {"-m", "--multirun"}:
            return  # another command of Hydra's, such as --help
        overrides = [argument for argument in arguments if argument not in flags]
        with hydra.initialize_config_dir(str(self.config_dir), version_base="1.3", job_name=self.name):
            hydra_config = self._compose(self._combinations(overrides)[0], with_hydra=True).hydra
            sweep = bool(flags) or hydra_config.mode == RunMode.MULTIRUN
            # A sweeper's configuration may sweep too; the arguments come on top of it.
            params = (hydra_config.sweeper.get("params") or {}) if sweep else {}
            for combination in self._combinations([*(f"{key}={value}" for key, value in params.items()), *overrides]):
                config = self._compose(combination)
            if not sweep:
                # A bad value in a sweep fails its own run only.
                load_check()(config)

    def _combinations(self, overrides: list[str]) -> list[list[str]]:
        """Lists of overrides without sweeps: every swept choice of a group occurs, and one value of other keys."""
        loader = GlobalHydra.instance().config_loader()
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(overrides)
        choices = []
        for key, override in {override.get_key_element(): override for override in parsed}.items():
            if not override.is_sweep_override():
                choices.append([override.input_line or ""])
            elif override.is_discrete_sweep():
                values = [f"{key}={value}" for value in override.sweep_string_iterator()]
                if not values:
                    raise ValueError(f"{override.input_line} matches nothing")
                choices.append(values if self._is_group(key) else values[:1])
        first = [options[0] for options in choices]
        return [first] + [
            [*first[:position], option, *first[position + 1 :]]
            for position, options in enumerate(choices)
            for option in options[1:]
        ]

    def _compose(self, overrides: list[str], with_hydra: bool = False) -> DictConfig:
        try:
            return hydra.compose("config", overrides=overrides, return_hydra_config=with_hydra)
        except MissingConfigException as error:
            group, _, name = (error.missing_cfg_file or "").rpartition("/")
            if f"{group}/{name}" in _EXTRAS:
                raise ValueError(f"{group}={name} needs the extra {_EXTRAS[f'{group}/{name}']!r}") from error
            if not error.options:
                raise
            raise ValueError(unknown(group or "config", name, error.options)) from error
        except ConfigCompositionException as error:
            match = re.search(r"Could not (?:override|delete[^']*) '([^']+)'", str(error))
            if match is None:
                raise
            key = match[1].split("@")[0]
            if key.startswith(self.open_keys):
                group = key.split(".")[0]
                raise ValueError(f"this {group} does not set {key}; write +{key}=... to add it") from error
            others = self._choices_with(key)
            if others:
                raise ValueError(f"unknown key {key!r}; it is a key of {' or '.join(others)}") from error
            groups = [override for override in overrides if self._is_group(override.split("=")[0])]
            known = hydra.compose("config", overrides=groups, return_hydra_config=key.startswith("hydra."))
            raise ValueError(unknown("key", key, _known_keys(known))) from error

    def _choices_with(self, key: str) -> list[str]:
        """The choices in the key's group whose files have it."""
        group, _, name = key.rpartition(".")
        files = sorted((self.config_dir / group).glob("*.yaml")) if group else []
        return [f"{group}={path.stem}" for path in files if name in OmegaConf.load(path)]

    def _is_group(self, key: str) -> bool:
        return (self.config_dir / key).is_dir()


def output_folder(folder: str | Path | None) -> Path:
    """The folder of a run, made if it is not there: `folder`, else Hydra's, else (outside of Hydra) a dated one."""
    if folder is None and HydraConfig.initialized():
        folder = HydraConfig.get().runtime.output_dir
    if folder is None:
        folder = f"outputs/{datetime.now():%Y-%m-%d/%H-%M-%S}"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def one_line(error: BaseException) -> str:
    """An error's message in one line, Hydra's too."""
    return error_line(error, HydraException)


def _log_to_file(message: str) -> None:
    """Log an error to the run's log file alone: the terminal gets it at the end."""
    record = _log.makeRecord(_log.name, logging.ERROR, __file__, 0, message, (), None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def _known_keys(config: DictConfig) -> list[str]:
    """All keys of the configuration, groups included, as they are written on the command line."""
    keys: list[str] = []

    def walk(node: DictConfig, prefix: str) -> None:
        for key in map(str, node):
            keys.append(f"{prefix}{key}")
            value: Any = node._get_node(key)
            if isinstance(value, DictConfig) and not value._is_none():
                walk(value, f"{prefix}{key}.")

    walk(config, "")
    return keys
