"""The configuration's shape: wrong keys and values stop a run at once, with one line naming the key."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tkn.app.messages import unknown
from tkn.app.schema import check_rules, typed
from tkn.attention import ATTENTION
from tkn.data import check_data_options, loader_options
from tkn.ops.engines import ENGINES
from tkn.several import COMBINE
from tkn.training.loggers.config import check_logger
from tkn.training.networks import check_model
from tkn.training.recipe import LR_SCHEDULES, WEIGHT_DECAY_FACTOR, check_optimizer

#: The arguments of Lightning's Trainer that a run leaves to the user.
LIGHTNING_KEYS = (
    "max_epochs",
    "accelerator",
    "devices",
    "strategy",
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "enable_progress_bar",
    "deterministic",
    "detect_anomaly",
)
#: And what a run itself does with the network.
TRAINER_KEYS = (*LIGHTNING_KEYS, "compile", "fourier", "cuda_graphs")
#: Half precision alone could not hold loc and scale; "mixed" keeps them in float32.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
#: How several processes train: each on its share of every batch, with the mean of the gradients.
STRATEGIES = ("auto", "ddp")
MODES = ("train", "test")


@dataclass
class AttentionConfig:
    name: str
    scale_unit: float
    min_size: Any  # int or "kernel"
    clip: bool
    windows: int = 1
    combine: str = "max"
    adaptive: bool = False


@dataclass
class PenaltyConfig:
    l2: float
    beta: float
    start: float
    end: float


@dataclass
class CostPenaltyConfig(PenaltyConfig):
    costs: bool


@dataclass
class BudgetConfig:
    share: float | None
    macs: float | None
    reach: float


@dataclass
class RecipeConfig:
    optimizer: dict[str, Any]
    weight_decay_as: str
    batch_size: int
    epochs: int
    lr_schedule: str
    lr_drops: list[float]
    lr_factor: float
    warmup: float
    attention_lr_factor: float
    label_smoothing: float
    ema_decay: float | None


@dataclass
class PruneConfig:
    runs: int | None
    margin: float
    grace: float


@dataclass
class ChannelsConfig:
    checkpoint: str | None = None
    macs: float | None = None
    lr_factor: float = 0.1


@dataclass
class RoisConfig:
    checkpoint: str | None = None
    places: str = "learned"


@dataclass
class RunConfig:
    """`model`, `data`, `trainer` and `logger` are open: a network's options, the loader's arguments, TRAINER_KEYS, a
    logger's keys. What has a default may be missing: configurations of earlier versions lack it."""

    model: dict[str, Any]
    data: dict[str, Any]
    recipe: RecipeConfig
    attention: AttentionConfig
    penalty: PenaltyConfig
    trainer: dict[str, Any]
    prune: PruneConfig
    logger: dict[str, Any]
    mode: str
    seed: int
    checkpoint: str | None
    engine: str
    data_dir: str
    experiment: str | None
    channels: ChannelsConfig = field(default_factory=ChannelsConfig)
    rois: RoisConfig = field(default_factory=RoisConfig)


@dataclass
class CostRunConfig(RunConfig):
    penalty: CostPenaltyConfig


@dataclass
class BudgetRunConfig(RunConfig):
    penalty: BudgetConfig  # type: ignore[assignment]  # in place of the other


def run_schema(penalty: Container[str]) -> type[RunConfig]:
    """The configuration's shape for a group `penalty` of these keys: `l2` and `none`, `l2_costs`, `budget`.

    Not one of all keys: a key more would make a run another one than those of earlier versions.
    """
    return BudgetRunConfig if "reach" in penalty else CostRunConfig if "costs" in penalty else RunConfig


def check_config(config: DictConfig) -> DictConfig:
    """The configuration, typed and checked. ValueError naming the first wrong key or value."""
    checked = typed(run_schema(config.get("penalty") or ()), config)
    check_model(checked)
    check_rules(checked, _rules(checked))
    data: dict[str, Any] = OmegaConf.to_container(checked.data)  # type: ignore[assignment]
    check_data_options(data["name"], loader_options(data))
    check_optimizer(OmegaConf.to_container(checked.recipe.optimizer))  # type: ignore[arg-type]
    for key in checked.trainer:
        if key not in TRAINER_KEYS:
            raise ValueError(unknown("key trainer", key, TRAINER_KEYS))
    checked.logger = check_logger(OmegaConf.to_container(checked.logger))  # type: ignore[arg-type]
    return checked


def _rules(config: DictConfig) -> Iterator[tuple[str, bool, str]]:
    """(key, is its value valid, what is)."""
    min_size, limit, validation = config.attention.min_size, config.data.get("limit"), config.data.get("validation", 0)
    epochs = config.trainer.get("max_epochs")
    yield "mode", config.mode in MODES, " or ".join(MODES)
    yield "engine", config.engine in ENGINES, f"one of {', '.join(ENGINES)}"
    yield "seed", 0 <= config.seed < 2**32, "a whole number from 0 to 2^32 - 1"
    yield "attention.name", config.attention.name in ATTENTION, f"one of {', '.join(ATTENTION)}"
    yield "attention.scale_unit", config.attention.scale_unit > 0, "positive"
    yield (
        "attention.min_size",
        min_size == "kernel" or (type(min_size) is int and min_size >= 1),
        "'kernel' or a whole number of pixels, at least 1",
    )
    yield from _layer_rules(config)
    yield from _penalty_rules(config.penalty)
    prune = config.prune
    yield "prune.runs", prune.runs is None or prune.runs >= 1, "null or at least 1"
    yield "prune.margin", 0 <= prune.margin < 1, "within [0, 1)"
    yield "prune.grace", 0 <= prune.grace < 1, "within [0, 1)"
    yield "recipe.batch_size", config.recipe.batch_size >= 1, "at least 1"
    yield "recipe.epochs", config.recipe.epochs >= 1, "at least 1"
    yield "recipe.lr_drops", all(0 < drop < 1 for drop in config.recipe.lr_drops), "fractions of the run within (0, 1)"
    yield "recipe.lr_factor", 0 < config.recipe.lr_factor <= 1, "within (0, 1]"
    yield "recipe.lr_schedule", config.recipe.lr_schedule in LR_SCHEDULES, f"one of {', '.join(LR_SCHEDULES)}"
    yield "recipe.warmup", 0 <= config.recipe.warmup < 1, "a fraction of the run within [0, 1)"
    yield "recipe.attention_lr_factor", config.recipe.attention_lr_factor >= 0, "at least 0"
    yield "recipe.label_smoothing", 0 <= config.recipe.label_smoothing < 1, "within [0, 1)"
    ema_decay = config.recipe.ema_decay
    yield "recipe.ema_decay", ema_decay is None or 0 < ema_decay < 1, "null or within (0, 1)"
    yield (
        "recipe.weight_decay_as",
        config.recipe.weight_decay_as in WEIGHT_DECAY_FACTOR,
        " or ".join(WEIGHT_DECAY_FACTOR),
    )
    for key in ("lr", "weight_decay"):
        value = config.recipe.optimizer.get(key, 0)
        yield f"recipe.optimizer.{key}", isinstance(value, int | float) and value >= 0, "a number, at least 0"
    channels = config.channels
    yield (
        "channels.lr_factor",
        channels.checkpoint is not None or channels.lr_factor == ChannelsConfig.lr_factor,
        f"{ChannelsConfig.lr_factor} without channels.checkpoint, for it has no effect there",
    )
    yield "data.limit", limit is None or (type(limit) is int and limit >= 1), "null or at least 1"
    yield "data.validation", type(validation) is int and validation >= 0, "a whole number, at least 0"
    yield "trainer.max_epochs", type(epochs) is int and epochs >= 1, "a whole number, at least 1"
    devices, batch_size = config.trainer.get("devices"), config.recipe.batch_size
    yield "trainer.devices", type(devices) is int and devices >= 1, "a whole number of processes, at least 1"
    yield "trainer.strategy", config.trainer.get("strategy") in STRATEGIES, " or ".join(STRATEGIES)
    # Batch normalisation of one image has no meaning.
    yield "recipe.batch_size", devices == 1 or batch_size >= 2 * devices, f"at least 2 for each of {devices} processes"
    yield "trainer.precision", config.trainer.get("precision") in PRECISIONS, f"one of {', '.join(PRECISIONS)}"
    for key in ("compile", "fourier", "cuda_graphs"):
        yield f"trainer.{key}", type(config.trainer.get(key)) is bool, "true or false"
    for part in ("train", "val", "test"):
        batches = config.trainer.get(f"limit_{part}_batches")
        yield f"trainer.limit_{part}_batches", batches is None or batches > 0, "null or more than 0"
    pain = config.data.get("name") in ("pain", "pain_synthetic")
    yield "recipe.label_smoothing", not (pain and config.recipe.label_smoothing), "0 for faces, which have no labels"
    # The frames held out would be of subjects that are trained on.
    yield "data.validation", not (pain and validation), "0 for faces: choose data.test_subjects"
    yield "checkpoint", config.mode != "test" or config.checkpoint is not None, "the path to test with mode=test"


def _layer_rules(config: DictConfig) -> Iterator[tuple[str, bool, str]]:
    """Of target layers other than those of one rectangle a kernel."""
    attention, trainer = config.attention, config.trainer
    windows, combine, adaptive = attention.windows, attention.combine, attention.adaptive
    yield "attention.windows", windows >= 1, "a whole number, at least 1"
    yield "attention.combine", combine in COMBINE, f"one of {', '.join(COMBINE)}"
    alone = "max with attention.windows=1, for it has no effect there"
    yield "attention.combine", windows > 1 or combine == "max", alone
    yield "attention.windows", windows == 1 or not adaptive, "1 with attention.adaptive=true"
    mixture = windows > 1 and combine != "parts"
    for what, chosen in (("attention.adaptive=true", adaptive), (f"attention.combine={combine}", mixture)):
        yield "engine", not chosen or config.engine != "roi", f"auto or dense with {what}: dense, then masked"
    budget = "reach" in config.penalty
    yield "penalty", not (mixture and budget), f"another than a budget with attention.combine={combine}: penalty=l2"
    yield "trainer.compile", not (adaptive and trainer.get("compile")), "false with attention.adaptive=true"
    yield "trainer.devices", not adaptive or trainer.get("devices") == 1, "1 with attention.adaptive=true"


def _penalty_rules(penalty: DictConfig) -> Iterator[tuple[str, bool, str]]:
    if "reach" in penalty:
        share, macs = penalty.share, penalty.macs
        yield "penalty.share", share is None or 0 < share <= 1, "null or within (0, 1]"
        yield "penalty.macs", macs is None or macs > 0, "null or positive"
        yield "penalty.macs", macs is None or share is None, f"null with penalty.share={share}: a budget is one of both"
        yield (
            "penalty.share",
            macs is not None or share is not None,
            "a share of the dense multiply-adds, such as 0.3, or give penalty.macs",
        )
        yield "penalty.reach", 0 < penalty.reach <= 1, "a fraction of the run within (0, 1]"
    else:
        yield "penalty.l2", penalty.l2 >= 0, "at least 0"
        yield "penalty.beta", penalty.beta >= 0, "at least 0"
        yield "penalty.start", 0 <= penalty.start <= 1, "a fraction of the run within [0, 1]"
        yield "penalty.end", penalty.start <= penalty.end <= 1, "within [penalty.start, 1]"
