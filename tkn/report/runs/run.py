"""What is in one run's folder, and what the run came to; damaged folders too."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from omegaconf import OmegaConf

from tkn.app.messages import message
from tkn.app.schema import flatten
from tkn.attention import ATTENTION
from tkn.data import HOW_READ
from tkn.data.base import is_own, is_whole
from tkn.data.fold_source import Fold, read_fold
from tkn.data.mnist import EMBEDDED_SOURCE
from tkn.fixed_rois import PLACES
from tkn.kinds import PLAIN
from tkn.training.config import run_schema


def _is_penalty(value: object) -> bool:
    """Whether it is a summary's penalty, or its budget."""
    if not isinstance(value, dict):
        return False
    return all(isinstance(value.get(key), int | float) for key in (("asked",) if "reach" in value else ("l2", "beta")))


#: What every summary must have, with its type.
_KEYS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("model", "data", "mode", "data_source"), str),
    **dict.fromkeys(("parameters", "macs_dense", "macs_roi", "seed", "epochs"), int),
    **dict.fromkeys(("wall_seconds", "train_seconds"), (int, float)),
}
#: What it may have, or null, and what is valid then.
_OPTIONAL: dict[str, Callable[[Any], bool]] = {
    "commit": lambda value: isinstance(value, str),
    "attention": lambda value: (
        isinstance(value, dict)
        and value.get("name") in ATTENTION
        and isinstance(value.get("scale_unit"), int | float)
        and value["scale_unit"] > 0
    ),
    "penalty": _is_penalty,
    "rois": lambda value: (
        isinstance(value, dict) and value.get("places") in PLACES and _is_penalty(value.get("penalty"))
    ),
    "target_layers": lambda value: (
        isinstance(value, list) and all(isinstance(row, dict) and {"name", "map_size"} <= row.keys() for row in value)
    ),
}

#: Keys that do not change a finished run's result, or that the summary's data_source says better.
_NO_DIFFERENCE = (
    *("seed", "mode", "checkpoint", "experiment", "data_dir", "data.source"),
    *("trainer.accelerator", "trainer.enable_progress_bar"),
    *(f"data.{key}" for key in HOW_READ),
)
#: How a CPU's device ends.
_THREADS = re.compile(r", \d+ threads$")
_NO_DIFFERENCE_GROUPS = ("logger.", "prune.")
#: What names a seed in the path of another run's file.
SEED_IN_PATH = re.compile(r"\bseed\d+\b")
_PLAIN = {f"attention.{key}": value for key, value in PLAIN.items()}
#: How they begin that a dense network does not use.
_OF_TARGETS = ("attention.", "penalty.", "engine")


@dataclass(frozen=True)
class Run:
    """A run's folder and what it came to.

    state: "finished" runs are counted. The others are not: "duplicate" (finished, but another run has the same
        configuration and seed), "pruned" (stopped early by a sweep), "tested" (mode=test), "unfinished", "failed",
        "damaged".
    reason: why it is not counted, in one line.
    remarks: what else a reader should know, a line each.
    summary: the content of summary.json, None if there is none that can be read.
    config: config.yaml with dotted keys, None if there is none that can be read.
    """

    folder: Path
    name: str
    state: str
    reason: str = ""
    remarks: tuple[str, ...] = ()
    summary: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None

    @property
    def result(self) -> Mapping[str, Any]:
        """The summary of a run that has one."""
        assert self.summary is not None
        return self.summary

    @property
    def whole(self) -> bool:
        """Whether it was trained and tested on the whole data set: only then it compares with published figures."""
        return is_whole(self.result["data_source"])

    @property
    def fold(self) -> Fold | None:
        """Which fold of its data it was tested on; None if these were not divided into folds."""
        return read_fold(self.result["data_source"])

    @property
    def soft(self) -> bool:
        """Whether its error is that of windows without clipping, unlike its multiply-adds."""
        return (self.result.get("attention") or {}).get("clip") is False

    @property
    def fixed_rois(self) -> str:
        """What a table says of ROIs that did not learn; empty if they did, or there are none."""
        rois = self.result.get("rois")
        return f"fixed {rois['places']} ROIs" if rois else ""

    @property
    def windows(self) -> str:
        """What a table calls a targeted run's windows: its attention, and that they did not learn."""
        name = str((self.result.get("attention") or {}).get("name", ""))
        return f"{name}, {self.fixed_rois}" if self.fixed_rois else name

    @property
    def shrunk_by(self) -> Mapping[str, Any]:
        """The penalty, or budget, that the ROIs were learned with: in another run if they are fixed in this one."""
        return (self.result.get("rois") or self.result).get("penalty") or {}

    @property
    def tests_best(self) -> bool:
        """Whether its figures are those of the best epoch on held-out images, not of the last."""
        return self.result.get("tested") == "best"

    @property
    def epoch(self) -> int:
        """The epoch whose model its figures are of."""
        epoch: int = self.result["best_epoch" if self.tests_best else "epochs"]
        return epoch

    @property
    def errors(self) -> tuple[str, ...]:
        """The first is the one that training minimises."""
        return error_names(self.result)

    @property
    def computed_on(self) -> dict[str, str | None]:
        """Its precision, device (a CPU whatever the number of threads) and version of torch, as far as it says them."""
        versions, device = self.result.get("versions") or {}, self.result.get("device")
        return {
            "precision": self.result.get("precision"),
            "device": _THREADS.sub("", device) if device else None,
            "torch": versions.get("torch"),
        }

    def identity(self, *, over_folds: bool = False) -> dict[str, Any]:
        """What it shares with the runs that differ from it only in the seed, or with `over_folds` in the fold too."""
        identity = {**self._identity(), **{key: self.computed_on[key] for key in ("device", "torch")}}
        if over_folds:
            assert self.fold is not None
            identity.pop("data.fold", None)
            identity["summary"] = {**identity["summary"], "data_source": self.fold.divided}
        return identity

    def _identity(self) -> dict[str, Any]:
        summary = self.result
        shared = {name: summary.get(name) for name in ("model", "data", "attention", "epochs")}
        # The multiply-adds that a budget's run met are its result.
        penalty = summary.get("penalty")
        shared["penalty"] = penalty and {key: value for key, value in penalty.items() if key != "met"}
        # Each seed may have its own run's ROIs.
        rois = summary.get("rois")
        shared["rois"] = rois and {key: value for key, value in rois.items() if key != "checkpoint"}
        # Where channels were pruned, each seed's network has its own widths.
        whole = (summary.get("narrowed") or {}).get("baseline_macs", summary["macs_dense"])
        identity: dict[str, Any] = {"summary": {**shared, "data_source": summary["data_source"], "macs_dense": whole}}
        if self.config is None or "model.name" not in self.config:  # moved results, damaged configurations
            return identity | flatten({**shared, **{n: summary.get(n) for n in ("engine", "precision", "tested")}})
        dense = not summary.get("attention")
        unpruned = self.config.get("channels.macs") is None
        return identity | {
            key: SEED_IN_PATH.sub("seed*", value) if key == "model.weights" and value else value
            for key, value in self.config.items()
            if key not in _NO_DIFFERENCE
            and not key.startswith(_NO_DIFFERENCE_GROUPS)
            and not (dense and key.startswith(_OF_TARGETS))
            and key not in ("channels.checkpoint", "rois.checkpoint")
            and not (unpruned and key.startswith("channels."))
            and not (not rois and key.startswith("rois."))
            # Earlier versions lack these.
            and not (key in _PLAIN and value == _PLAIN[key])
        }

    def settings(self, *, over_folds: bool = False) -> str:
        """`identity` as a text that is the same for runs that differ only so, of earlier versions too.

        These lack keys that now are null.
        """
        stated = {key: value for key, value in self.identity(over_folds=over_folds).items() if value is not None}
        return json.dumps(stated, sort_keys=True, default=str)


def short_source(source: str) -> str:
    """A data_source for headings: without the counts of the embedded digits."""
    return source.replace(EMBEDDED_SOURCE, "embedded digits")


def error_names(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """("error",) of a classification's summary, ("mse", "mae") of a regression's."""
    return ("error",) if "error" in summary else ("mse", "mae")


def clipped_errors(summary: Mapping[str, Any]) -> list[str]:
    """The errors of which a soft run's summary has the clipped one too."""
    return [name for name in error_names(summary) if isinstance(summary.get(f"{name}_clipped"), int | float)]


def read_run(folder: Path) -> Run | None:
    """The run in this folder itself; None if there is none."""
    config_text, config = _read_config(folder / "config.yaml")
    begin = Run(folder, folder.as_posix(), "finished", config=config)
    if (folder / "summary.json").exists():
        return _with_summary(begin, config_text)
    if config is not None and "model.name" in config and "recipe.batch_size" in config:
        return _without_summary(begin)
    if (folder / "tkn-run.log").exists():
        if config_text and config is None:
            return replace(begin, state="damaged", reason="config.yaml cannot be read, and there is no summary.json")
        return _without_summary(begin)
    return None


def _read_config(path: Path) -> tuple[str, dict[str, Any] | None]:
    """(text, dotted keys); the keys are None if it is not a configuration."""
    try:
        text = path.read_text(encoding="utf-8")
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (OSError, UnicodeDecodeError):
        return "", None
    except Exception:  # the YAML parser's own kinds too
        return text, None
    return text, flatten({str(key): value for key, value in content.items()}) if isinstance(content, dict) else None


def _with_summary(run: Run, config_text: str) -> Run:
    try:
        summary = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = message(error)
        return replace(run, state="damaged", reason=f"summary.json cannot be read: {reason}")
    wrong = _wrong_key(summary)
    if wrong:
        return replace(run, state="damaged", reason=f"summary.json {wrong}")
    run = replace(run, summary=summary, remarks=tuple(_remarks(run, summary, config_text)))
    errors = ", ".join(f"{name} {summary[name]:g}" for name in run.errors)
    if summary["mode"] != "train":
        return replace(run, state="tested", reason=f"only tests a checkpoint: {errors}")
    if summary.get("pruned_epoch") is not None:
        return replace(run, state="pruned", reason=f"stopped by its sweep in epoch {summary['pruned_epoch']}: {errors}")
    return run


def _wrong_key(summary: object) -> str | None:
    """What is wrong with a summary, in words that follow its name."""
    if not isinstance(summary, dict):
        return "holds no keys"
    for key, kind in _KEYS.items():
        if key not in summary:
            return f"has no {key}"
        if not isinstance(summary[key], kind) or isinstance(summary[key], bool):
            return f"has {key}={summary[key]!r}"
    for key, valid in _OPTIONAL.items():
        if summary.get(key) is not None and not valid(summary[key]):
            return f"has {key}={summary[key]!r}"
    for name in error_names(summary):
        value = summary.get(name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return f"has {name}={value!r}" if name in summary else "has neither error nor mse and mae"
    return None if summary["macs_roi"] > 0 else f"has macs_roi={summary['macs_roi']}"


def _remarks(run: Run, summary: Mapping[str, Any], config_text: str) -> Iterator[str]:
    if is_own(summary["data_source"]):
        yield f"own data: {summary['data_source'].removeprefix('own: ')}"
    elif not summary["data_source"].startswith("full"):
        yield f"not the whole data set ({summary['data_source'].split(':')[0]})"
    elif summary["data_source"] != "full":
        yield f"data: {summary['data_source']}"
    if (summary.get("attention") or {}).get("clip") is False:
        clipped = ", ".join(f"{name} {summary[f'{name}_clipped']:g}" for name in clipped_errors(summary))
        yield f"the error is without clipping to the ROIs{f'; clipped: {clipped}' if clipped else ''}"
    if run.config is None:
        yield "config.yaml cannot be read" if config_text else "there is no config.yaml"
    else:
        has, lacks = _other_keys(run.config)
        changes = [f"has {', '.join(has)}"] * bool(has) + [f"lacks {', '.join(lacks)}"] * bool(lacks)
        if changes:
            yield f"config.yaml is of another version: it {' and '.join(changes)}"


def _other_keys(config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Keys that the configuration has and the present one has not, and the other way around."""
    penalty = [key.removeprefix("penalty.") for key in config if key.startswith("penalty.")]
    schema = run_schema(penalty)
    known = {key.name: key for key in _schema_keys(schema)}
    opened = tuple(f"{key.name}." for key in known.values() if key.open)
    has = [name for name in config if name not in known and not name.startswith(opened)]
    lacks = [
        key.name
        for key in known.values()
        if key.name not in config
        and not key.optional
        and not (key.open and any(name.startswith(f"{key.name}.") for name in config))
    ]
    return has, lacks


class _Key(NamedTuple):
    """Of a configuration: its dotted name, may it hold any keys, and may it be missing."""

    name: str
    open: bool
    optional: bool


def _schema_keys(schema: type, prefix: str = "", optional: bool = False) -> Iterator[_Key]:
    """Of a configuration's dataclass."""
    hints = get_type_hints(schema)
    for item in fields(schema):
        may_miss = optional or item.default is not MISSING or item.default_factory is not MISSING
        if is_dataclass(hints[item.name]):
            yield from _schema_keys(hints[item.name], f"{prefix}{item.name}.", may_miss)
        else:
            yield _Key(f"{prefix}{item.name}", hints[item.name] == dict[str, Any], may_miss)


def _without_summary(run: Run) -> Run:
    error = _last_error(run.folder / "tkn-run.log")
    if error:
        return replace(run, state="failed", reason=error)
    rows = _history(run.folder / "metrics.csv")
    epochs = (run.config or {}).get("trainer.max_epochs")
    of_all = f" of {epochs}" if epochs is not None else ""
    if rows is None:
        return replace(run, state="unfinished", reason="no summary.json, and metrics.csv cannot be read")
    if not rows:
        return replace(run, state="unfinished", reason=f"no epoch{of_all} done")
    last = rows[-1]
    errors = [f"{key} {value}" for key, value in last.items() if key in _EVALUATED]
    return replace(run, state="unfinished", reason=", ".join([f"{last['epoch']}{of_all} epochs done", *errors]))


_EVALUATED = [f"{split}/{name}" for split in ("test", "valid") for name in ("error", "mse", "mae")]


def _history(path: Path) -> list[dict[str, str]] | None:
    """The rows of metrics.csv; none if it is not there, None if it cannot be read."""
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        return None
    return rows if all((row.get("epoch") or "").isdigit() for row in rows) else None


#: Before the message of a sweep's run.
_OF_SWEEP = re.compile(r"^run \S+ \(.*?\) failed: ")
_RECORD = re.compile(r"^\S+ (DEBUG|INFO|WARNING|ERROR|CRITICAL) (.*)$")


def _last_error(path: Path) -> str | None:
    """The message of the log's last ERROR line, if nothing of a later attempt follows it."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    records = [match for line in lines if (match := _RECORD.match(line))]
    for record in reversed(records):
        if record[1] == "INFO":
            return None
        if record[1] in ("ERROR", "CRITICAL"):
            return _OF_SWEEP.sub("", record[2])
    return None
