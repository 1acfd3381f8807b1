"""Runs that differ only in the seed as one row; rows on whole data sets apart from all others.

Runs on folds are in none of these, see `tkn.report.runs.folds`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from statistics import mean, stdev
from typing import Any

from omegaconf import OmegaConf

from tkn.app.schema import flatten
from tkn.data.base import is_own
from tkn.models import BASE
from tkn.report.paper import PAPER, PaperRow, paper_experiment
from tkn.report.runs.run import Run, clipped_errors, short_source
from tkn.training.compose import compose


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation of n values; deviation is None for a single one."""

    n: int
    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistic:
        return cls(len(values), mean(values), stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Group:
    """Counted runs that differ only in the seed, in the order of their seeds, and how a table calls them."""

    label: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def common(self) -> Mapping[str, Any]:
        """A summary whose model, data, attention, penalty, parameters and dense multiply-adds are those of all runs."""
        return self.first.result

    @property
    def seeds(self) -> list[int]:
        return [run.result["seed"] for run in self.runs]

    @property
    def errors(self) -> tuple[str, ...]:
        return self.first.errors

    @property
    def base_model(self) -> str:
        """The dense network that a targeted or narrower one is made of; of a whole dense one itself."""
        # Earlier versions' summaries do not say it.
        return str(self.common.get("base_model") or BASE.get(self.common["model"], self.common["model"]))

    @property
    def targeted(self) -> bool:
        return bool(self.common.get("attention"))

    def statistic(self, key: str) -> Statistic | None:
        """Over the runs' summaries; None if one of them lacks the key."""
        values = [run.result.get(key) for run in self.runs]
        numbers = [value for value in values if isinstance(value, int | float)]
        return Statistic.of(numbers) if len(numbers) == len(values) else None

    @property
    def times_fewer(self) -> float:
        """Multiply-adds of the dense network over the runs' mean."""
        return self.common["macs_dense"] / mean(run.result["macs_roi"] for run in self.runs)

    @property
    def computed_on(self) -> Mapping[str, str | None]:
        """Precision, device and version of torch, which are those of all runs."""
        return self.first.computed_on

    @property
    def devices(self) -> list[str]:
        """Each run's precision and device, once."""
        texts = (", ".join(filter(None, map(run.result.get, ("precision", "device")))) for run in self.runs)
        return list(dict.fromkeys(text for text in texts if text))

    @cached_property
    def experiment(self) -> str | None:
        """The paper's row that these runs' settings are those of; only runs on whole data sets stand beside it."""
        return paper_experiment(self.common) if self.first.whole else None

    @property
    def paper(self) -> PaperRow | None:
        return PAPER[self.experiment] if self.experiment else None

    @cached_property
    def remarks(self) -> list[str]:
        """What a reader of the row should know."""
        remarks = list(dict.fromkeys(remark for run in self.runs for remark in run.remarks if _belongs_in_row(remark)))
        if self.first.soft:
            clipped = [(name, self.statistic(f"{name}_clipped")) for name in clipped_errors(self.common)]
            texts = [f"{name} {plus_minus(statistic, name)}" for name, statistic in clipped if statistic]
            remarks.append(f"error without clipping to the ROIs; clipped: {', '.join(texts) or 'unknown'}")
        if self.experiment and self.first.config:
            remarks += _deviations(self.experiment, self.first)
        return remarks


def _belongs_in_row(remark: str) -> bool:
    """Whether neither the section's heading nor the row's own figures say the remark."""
    return not remark.startswith(("not the whole data set", "own data", "the error is without clipping"))


@cache
def composed(*arguments: str) -> Mapping[str, Any]:
    """The configuration that these arguments of tkn-run compose, with dotted keys."""
    content: Any = OmegaConf.to_container(compose(*arguments), resolve=True)
    return flatten(content)


def _deviations(experiment: str, run: Run) -> list[str]:
    """Where a run's configuration is not that of the experiment it stands for."""
    identity = run.identity()
    expected = composed(f"experiment={experiment}")
    changes = [
        f"{key}={identity[key]}, not {value}" for key, value in expected.items() if identity.get(key, value) != value
    ]
    return [f"differs from experiment={experiment}: {'; '.join(changes)}"] if changes else []


@dataclass(frozen=True)
class Section:
    """Rows whose data are of one source: whole data sets ("full"), or one of the others."""

    source: str
    groups: tuple[Group, ...]

    @property
    def whole(self) -> bool:
        return self.groups[0].first.whole

    @property
    def title(self) -> str:
        if self.whole:
            return "Whole data sets"
        if is_own(self.source):
            return f"Own data: {self.source.removeprefix('own: ')}"
        return f"Not the whole data set: {short_source(self.source)}"


def plus_minus(statistic: Statistic, name: str) -> str:
    """Mean and deviation of an "error" in percent, "mse" or "mae"."""
    digits = digits_of(name)
    text = f"{statistic.mean:.{digits}f}"
    return text if statistic.deviation is None else f"{text} ± {statistic.deviation:.{digits}f}"


def digits_of(name: str) -> int:
    """The decimals that suit an "error" in percent, "mse" or "mae"."""
    return 2 if name.endswith("error") else 3


def sections(runs: Iterable[Run]) -> list[Section]:
    """The counted runs but those on folds as rows, in a fixed order of their settings.

    Whole data sets come first, then others by their source.
    """
    by_source: dict[str, list[Run]] = {}
    for run in runs:
        if run.state == "finished" and run.fold is None:
            source = "full" if run.whole else run.result["data_source"]
            by_source.setdefault(source, []).append(run)
    ordered = sorted(by_source, key=lambda source: (source != "full", source))
    return [Section(source, groups_of(by_source[source])) for source in ordered]


def groups_of(runs: Iterable[Run], *, over_folds: bool = False) -> tuple[Group, ...]:
    """The runs as rows, labelled, in a fixed order; with `over_folds` runs that differ in the fold too are of one."""
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(run.settings(over_folds=over_folds), []).append(run)
    rows = [sorted(members, key=lambda run: run.result["seed"]) for members in alike.values()]
    identities = [row[0].identity(over_folds=over_folds) for row in rows]
    names = _labels([_base_label(row) for row in rows], identities)
    groups = [Group(name, tuple(row)) for name, row in zip(names, rows, strict=True)]
    return tuple(sorted(groups, key=_order))


def _order(group: Group) -> tuple[Any, ...]:
    common = group.common
    penalty = group.first.shrunk_by
    table = group.paper.table if group.paper else 0
    settings = (group.first.windows, penalty.get("asked", 0), penalty.get("l2", 0), penalty.get("beta", 0))
    return (table, common["data"], group.base_model, group.targeted, *settings, group.label)


def _base_label(row: Sequence[Run]) -> str:
    run, summary = row[0], row[0].result
    experiments = [name for member in row if (name := member.result.get("experiment"))]
    if not summary.get("attention"):
        return experiments[0] if experiments else f"{summary['model']} {summary['data']}"
    penalty = run.shrunk_by
    settings = [f"{key} {penalty[key]:.3g}" for key in ("l2", "beta") if key in penalty]
    settings += [f"budget {penalty['asked'] / summary['macs_dense']:.3g}"] if "asked" in penalty else []
    if experiments:
        # The experiment says it all, but for ROIs of another run.
        return ", ".join([experiments[0], run.fixed_rois, *settings]) if run.fixed_rois else experiments[0]
    return ", ".join([f"{summary['model']} {summary['data']} {run.windows}", *settings])


def _labels(bases: Sequence[str], identities: Sequence[Mapping[str, Any]]) -> list[str]:
    """The labels; rows of the same base label are told apart by the keys in which they differ."""
    labels = []
    for base, identity in zip(bases, identities, strict=True):
        rivals = [other for name, other in zip(bases, identities, strict=True) if name == base]
        # Summaries have other keys than configurations.
        alike = [other for other in rivals if _configured(other) == _configured(identity)]
        differing = [key for key in sorted(identity) if len({_text(other.get(key)) for other in alike}) > 1]
        parts = [_setting(key, identity[key]) for key in differing if key != "summary"]
        if len(alike) < len(rivals) and not _configured(identity):
            parts.append("without config.yaml")
        labels.append(", ".join([base, *parts]))
    return labels


def _configured(identity: Mapping[str, Any]) -> bool:
    """Whether it is that of a run with a configuration."""
    return "model.name" in identity


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _setting(key: str, value: Any) -> str:
    """A key and its value for a label: the last part of a dotted key unless it says too little, three digits."""
    if key == "attention.name":
        return str(value)
    last = key.split(".")[-1]
    short = f"{value:.3g}" if isinstance(value, float) else str(value)
    return f"{key if last in ('name', 'limit', 'seed') else last} {short}"
