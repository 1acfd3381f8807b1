"""The shape of tkn-bench's configuration: wrong keys and values stop it at once, with one line naming the key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torchvision
from omegaconf import DictConfig, OmegaConf
from torchvision.models import list_models

from tkn.app.messages import unknown
from tkn.app.schema import check_rules, typed
from tkn.bench.engines import TIMED_ENGINES
from tkn.models import MODEL_NAMES
from tkn.plan.place import Place

#: The baseline and the targeted network of a case that names one of torchvision's.
TORCHVISION = "torchvision"
#: The same of a case of one dimension, `tkn.bench.tc_resnet`.
KEYWORDS = "tc_resnet8"
#: The same of a case of a finished run.
RUN = "run"
TARGETS = ("all", "spatial")
SOURCES = ("file", "checkpoint", "generated")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass
class CaseConfig:
    name: str
    baseline: str
    targeted: str
    input_size: list[int]
    num_outputs: int
    share: float
    #: of `TORCHVISION` alone
    network: str | None = None
    size: int | None = None
    targets: str | None = None
    #: of `RUN` alone
    path: str | None = None
    factory: str | None = None


@dataclass
class RoisConfig:
    source: str
    path: str | None
    share: list[float]


@dataclass
class ThinnedConfig:
    multiple: int


@dataclass
class MeasureConfig:
    rounds: int
    repeats: int
    seconds: float
    warmup: float


@dataclass
class BenchConfig:
    """conf/bench/config.yaml says what each key means."""

    case: CaseConfig
    rois: RoisConfig
    device: str
    dtype: str
    engines: list[str]
    batch_sizes: list[int]
    train_batch_sizes: list[int]
    threads: int | None
    thinned: ThinnedConfig
    measure: MeasureConfig
    memory: bool
    seed: int


def check_config(config: DictConfig) -> DictConfig:
    """The configuration, typed and checked; one `rois.share` becomes a list. ValueError for the first wrong key."""
    if isinstance(OmegaConf.select(config, "rois.share"), int | float):
        config = OmegaConf.merge(config, {"rois": {"share": [config.rois.share]}})  # type: ignore[assignment]
    config = typed(BenchConfig, config)
    for name in config.engines:
        if name not in TIMED_ENGINES:
            raise ValueError(unknown("engine", name, TIMED_ENGINES))
    check_rules(config, _rules(config))
    place = place_of(config)
    if not any(place.device.type in TIMED_ENGINES[name].devices for name in config.engines):
        raise ValueError(f"engines={list(config.engines)} has none that computes on device={config.device!r}")
    return config


def place_of(config: DictConfig) -> Place:
    """Where it is to be computed, in what numbers; ValueError if plans can't be there."""
    return Place.of(config.device, getattr(torch, config.dtype))


def _rules(config: DictConfig) -> Iterator[tuple[str, bool, str]]:
    """(key, is its value valid, what is)."""
    case, rois, measure = config.case, config.rois, config.measure
    if RUN in (case.baseline, case.targeted):
        yield "case.baseline", case.baseline == case.targeted, f"{RUN}, as case.targeted"
        yield "rois.source", rois.source == "checkpoint", f"checkpoint with case={RUN}"
        yield "case.path", case.path is not None, f"the folder of a run with case={RUN}"
    elif TORCHVISION in (case.baseline, case.targeted):
        yield from _torchvision_rules(config)
    else:
        names = (*MODEL_NAMES, KEYWORDS)
        yield "case.baseline", case.baseline in names, f"one of {', '.join(names)}"
        yield "case.targeted", case.targeted in names, f"one of {', '.join(names)}"
        for key in ("network", "size", "targets"):
            yield f"case.{key}", case[key] is None, f"null but with case={TORCHVISION}"
    for key in ("path", "factory"):
        yield f"case.{key}", case[key] is None or case.baseline == RUN, f"null but with case={RUN}"
    lines = KEYWORDS in (case.baseline, case.targeted)
    if lines:
        yield "case.baseline", case.baseline == case.targeted, f"{KEYWORDS}, as case.targeted"
        yield "rois.source", rois.source == "generated", f"generated with case.baseline={KEYWORDS}"
    unread = case.baseline == RUN and not case.input_size  # the run says it
    yield (
        "case.input_size",
        unread or (len(case.input_size) == (2 if lines else 3) and min(case.input_size) >= 1),
        "[channels, frames], each at least 1" if lines else "[channels, height, width], each at least 1",
    )
    # A training step's loss is the cross entropy.
    regression = case.baseline == RUN and case.num_outputs == 1
    yield "train_batch_sizes", not (regression and config.train_batch_sizes), "[] for a network of one output"
    yield "case.num_outputs", unread or regression or case.num_outputs >= 2, "at least 2"
    yield "rois.source", rois.source in SOURCES, f"one of {', '.join(SOURCES)}"
    needs_path = rois.source != "generated" and case.baseline != RUN
    yield "rois.path", rois.path is not None or not needs_path, f"a path with rois.source={rois.source}"
    yield (
        "rois.share",
        rois.source != "generated" or (_distinct(rois.share) and all(0 < share <= 1 for share in rois.share)),
        "a number, or different ones, within (0, 1]",
    )
    yield "dtype", config.dtype in DTYPES, f"one of {', '.join(DTYPES)}"
    on_cpu = config.device == "cpu" and config.dtype == "bfloat16"
    yield "dtype", not on_cpu, "float32 on a CPU, where the engines whose names end with -reduced multiply in bfloat16"
    yield "engines", _distinct(config.engines), "a list of different names"
    # Batch normalisation has no variance of one image.
    for key, least in (("batch_sizes", 1), ("train_batch_sizes", 2)):
        valid = not config[key] or (_distinct(config[key]) and min(config[key]) >= least)
        yield key, valid, f"a list of different numbers, at least {least}"
    yield "train_batch_sizes", bool(config.batch_sizes or config.train_batch_sizes), "set without batch_sizes"
    yield "threads", config.threads is None or config.threads >= 1, "null or at least 1"
    yield "thinned.multiple", config.thinned.multiple >= 1, "at least 1"
    yield "measure.rounds", measure.rounds >= 1, "at least 1"
    yield "measure.repeats", measure.repeats >= 1, "at least 1"
    yield "measure.seconds", measure.seconds >= 0, "at least 0"
    yield "measure.warmup", measure.warmup >= 0, "at least 0"
    yield "memory", not config.memory or bool(config.batch_sizes), "false without batch_sizes"
    yield "memory", not config.memory or config.device == "cpu", "false on a GPU, whose memory is not measured"
    yield "seed", 0 <= config.seed < 2**32, "a whole number from 0 to 2^32 - 1"


def _torchvision_rules(config: DictConfig) -> Iterator[tuple[str, bool, str]]:
    case = config.case
    yield "case.baseline", case.baseline == case.targeted, f"{TORCHVISION}, as case.targeted"
    if case.network not in classifiers():
        raise ValueError(unknown("case.network", case.network, classifiers()))
    yield "case.targets", case.targets in TARGETS, f"one of {', '.join(TARGETS)}"
    yield "rois.source", config.rois.source == "generated", f"generated with case={TORCHVISION}"


def classifiers() -> list[str]:
    """The names of torchvision's networks for images, without those of several parts."""
    return list_models(module=torchvision.models)


def _distinct(values: list[float] | list[int] | list[str]) -> bool:
    return 0 < len(set(values)) == len(values)
