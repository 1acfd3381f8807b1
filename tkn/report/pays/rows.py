"""The runs of one row: those that are alike, and by name those that are not counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tkn.report.pays.design import SHARE, TOLERANCE
from tkn.report.runs.collect import collect
from tkn.report.runs.groups import Group
from tkn.report.runs.run import SEED_IN_PATH, Run

#: Keys whose path says only where a machine keeps its data.
_PLACES = ("data.path", "summary.data_source")
#: Of the differences of two configurations, how many are said.
_SAID = 4


@dataclass(frozen=True)
class Row:
    """A row's runs.

    group: the most runs that differ only in the seed, None without any; left_out: the others, a text each.
    """

    experiment: str
    group: Group | None
    left_out: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        return len(self.group.runs) if self.group else 0


def read_row(results: Path, experiment: str) -> Row:
    """The row of the runs in results/<experiment>/.

    A row is of one configuration, precision, device and version of torch: where runs differ in these, those of which
    there are most are taken, of equally many those with the lowest seed.
    """
    folder = results / experiment
    if not folder.is_dir():
        return Row(experiment, None)
    runs, _ = collect([folder])
    left_out = [f"{where(run)}: {run.state}: {run.reason}" for run in runs if run.state != "finished"]
    finished = [run for run in runs if run.state == "finished"]
    left_out += [f"{where(run)}: has no config.yaml" for run in finished if run.config is None]
    alike: dict[str, list[Run]] = {}
    for run in finished:
        if run.config is not None:
            alike.setdefault(str(sorted(conditions(run).items())), []).append(run)
    if not alike:
        return Row(experiment, None, tuple(left_out))
    taken, *others = sorted(alike.values(), key=lambda runs: (-len(runs), min(run.result["seed"] for run in runs)))
    for run in (run for runs in others for run in runs):
        left_out.append(f"{where(run)}: {'; '.join(differences(conditions(run), conditions(taken[0])))}")
    ordered = sorted(taken, key=lambda run: run.result["seed"])
    return Row(experiment, Group(experiment, tuple(ordered)), tuple(left_out))


def where(run: Run) -> str:
    """Of a run, below the folder of results: experiment/seed."""
    return f"{run.folder.parent.name}/{run.folder.name}"


def conditions(run: Run) -> dict[str, str]:
    """What the runs of a row must share: the configuration, and on what it was computed.

    Paths count by their last parts, those of other runs whatever the seed.
    """
    identity = run.identity()
    stated = {f"summary.{key}": value for key, value in identity.pop("summary").items()} | identity
    shared = {key: _without_place(key, value) for key, value in stated.items() if value is not None}
    return {**shared, **{key: str(value) for key, value in run.computed_on.items()}}


def _without_place(key: str, value: Any) -> str:
    text = SEED_IN_PATH.sub("seed*", str(value))
    return "/".join(text.split("/")[-1 if key in _PLACES else -3 :])


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Where one is not as the other, in words, the first few."""
    keys = [key for key in {**other, **one} if one.get(key) != other.get(key)]
    # What computed says more than the key of the configuration that chose it.
    keys.sort(key=lambda key: key not in ("precision", "device", "torch"))
    said = [f"{key} {one.get(key)}, not {other.get(key)}" for key in keys[:_SAID]]
    return said + [f"and {len(keys) - _SAID} more keys"] * (len(keys) > _SAID)


def whole_macs(groups: Sequence[Group]) -> int | None:
    """The multiply-adds of a set's dense network, as any of its rows says them; None without rows."""
    for group in groups:
        common = group.common
        return int((common.get("narrowed") or {}).get("baseline_macs") or common["macs_dense"])
    return None


def off_budget(group: Group, whole: int) -> str:
    """The runs whose multiply-adds are not a third of the whole network's, in words; empty if there are none."""
    shares = {run.result["seed"]: run.result["macs_roi"] / whole for run in group.runs}
    off = {seed: share for seed, share in shares.items() if abs(share / SHARE - 1) > TOLERANCE}
    said = ", ".join(f"{percent(share)} (seed {seed})" for seed, share in off.items())
    return f"{said} of the multiply-adds, not a third" if off else ""


def percent(share: float) -> str:
    """With one decimal."""
    return f"{100 * share:.1f} %"
