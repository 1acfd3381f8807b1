"""hydra/sweeper=pareto: Optuna chooses the runs, minimising both of their objectives; Hydra's launcher starts them.

Hydra imports all of `hydra_plugins` whenever it starts, in other programs too: so what takes long is imported late.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, Trial

_log = logging.getLogger(__name__)


class ParetoSweeper(Sweeper):
    """Searches for the runs of a task that no other beats in both of its `tkn.sweep.objectives.Objectives`.

    Args:
        n_trials: the number of runs.
        n_jobs: so many are chosen before the next results are looked at, and handed to the launcher together.
        sampler: an Optuna sampler's `_target_` and arguments. With a seed the same results lead to the same choices.
        params: swept and other overrides; those of the command line come on top.
    """

    def __init__(self, n_trials: int, n_jobs: int, sampler: DictConfig, params: DictConfig | None) -> None:
        self.n_trials = n_trials
        self.n_jobs = n_jobs
        self.sampler = sampler
        self.params: Mapping[str, Any] = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config: DictConfig = config
        self.hydra_context: HydraContext = hydra_context
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials. The first failure is raised when all are done; ValueError before for wrong settings."""
        try:
            import optuna
        except ModuleNotFoundError as error:
            raise ValueError("hydra/sweeper=pareto needs the extra 'sweep'") from error
        from tkn.app.schema import check_rules
        from tkn.sweep.objectives import Objectives

        for key in ("n_trials", "n_jobs"):
            value = getattr(self, key)
            valid = type(value) is int and value >= 1
            check_rules(self.config, [(f"hydra.sweeper.{key}", valid, "a whole number, at least 1")])
        fixed, space = self._search_space(arguments)

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            directions=["minimize"] * len(Objectives._fields), sampler=instantiate(self.sampler)
        )
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        jobs: list[JobReturn] = []
        while len(jobs) < self.n_trials:
            trials = [study.ask(space) for _ in range(min(self.n_jobs, self.n_trials - len(jobs)))]
            overrides = [[*fixed, *_written(trial.params)] for trial in trials]
            self.validate_batch_is_legal(overrides)
            finished = self.launcher.launch(overrides, initial_job_idx=len(jobs))
            for trial, job in zip(trials, finished, strict=True):
                _tell(study, trial, job)
            jobs += finished
        _report(study.trials, study.best_trials)
        for job in jobs:
            job.return_value  # noqa: B018 - raises if the run failed

    def _search_space(self, arguments: list[str]) -> tuple[list[str], dict[str, BaseDistribution]]:
        """(the overrides that all runs share, the distribution of every swept key)."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = {
            override.get_key_element(): override
            for override in parser.parse_overrides([*_written(self.params), *arguments])
        }
        fixed = [override.input_line or "" for override in overrides.values() if not override.is_sweep_override()]
        space = {key: _distribution(override) for key, override in overrides.items() if override.is_sweep_override()}
        if not space:
            raise ValueError(
                "hydra/sweeper=pareto has no key to vary, such as penalty.l2='tag(log,interval(1e-5,1e-3))'"
            )
        return fixed, space


def _written(params: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in params.items()]


def _distribution(override: Override) -> BaseDistribution:
    """What an override such as key=interval(0,1) or key=a,b lets Optuna choose from."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if override.is_discrete_sweep():
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    interval = override.value()
    assert isinstance(interval, IntervalSweep)
    if interval.tags - {"log"}:
        raise ValueError(f"{override.input_line}: the only tag of an interval is log")
    try:
        kind: Any = IntDistribution if type(interval.start) is type(interval.end) is int else FloatDistribution
        return kind(interval.start, interval.end, log="log" in interval.tags)
    except ValueError as error:
        raise ValueError(f"{override.input_line}: {error}") from error


def _tell(study: Study, trial: Trial, job: JobReturn) -> None:
    from optuna.trial import TrialState

    from tkn.sweep.objectives import PrunedObjectives

    if job.status != JobStatus.COMPLETED:
        study.tell(trial, state=TrialState.FAIL)
    elif isinstance(job.return_value, PrunedObjectives):
        # Optuna takes no values of it. Its samplers take it for worse than those that went on to the end.
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, job.return_value)


def _report(trials: list[FrozenTrial], best: list[FrozenTrial]) -> None:
    """Log the runs that no other beats in both objectives, from the cheapest."""
    from tkn.sweep.objectives import Objectives

    count = {state: sum(trial.state.name == state for trial in trials) for state in ("PRUNED", "FAIL")}
    _log.info("%d runs, %d pruned, %d failed; not beaten in both:", len(trials), count["PRUNED"], count["FAIL"])
    for trial in sorted(best, key=lambda trial: Objectives(*trial.values).macs_roi):
        values = Objectives(*trial.values)
        params = " ".join(_written(trial.params))
        _log.info("#%d: error %.4g, %.4gM multiply-adds: %s", trial.number, values.error, values.macs_roi / 1e6, params)
