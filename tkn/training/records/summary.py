"""summary.json: what a run came to, and under which conditions."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

from tkn.app.processor import processor_name
from tkn.app.versions import package_versions
from tkn.backends.torch.fourier import uses_fourier
from tkn.budget import asked_macs
from tkn.data.base import is_own, is_whole
from tkn.kinds import PLAIN, other_than_plain
from tkn.macs import MacsReport
from tkn.training.batches import TensorDataModule
from tkn.training.cuda_graphs import supports_cuda_graphs
from tkn.training.module import TargetedTraining
from tkn.training.records.history import History, shortened

_PACKAGES = ("torch", "torchvision", "pytorch-lightning", "hydra-core", "numpy")


def describe_source(source: str, config: DictConfig) -> str:
    """A data set's source, and what of it was left out: results on a part do not compare with those on the whole."""
    keys = ["data.limit", *(f"trainer.limit_{part}_batches" for part in ("train", "val", "test"))]
    cuts = [f"{key}={value}" for key in keys if (value := OmegaConf.select(config, key)) is not None]
    return f"partial: {', '.join(cuts)} of {source}" if cuts else source


def run_title(model: str, data: str, source: str) -> str:
    """What a run's pictures are called: its model and data, and where these came from if they are not whole."""
    if is_own(source):
        return f"{model} on {source.removeprefix('own: ').split(',')[0]}"
    return f"{model} on {data}" + ("" if is_whole(source) else f" ({source.split(':')[0]} data)")


def summarise(
    config: DictConfig,
    trained: DictConfig,
    source: str,
    module: TargetedTraining,
    datamodule: TensorDataModule,
    history: History,
    best: Mapping[str, float] | None,
    pruned_epoch: int | None,
    tested: Mapping[str, float],
    trainer: pl.Trainer,
    commit: str | None,
) -> dict[str, Any]:
    """The content of summary.json.

    `config` is this run's configuration, `trained` that of the training, which for mode=test was another run's;
    `source` says where the data came from, `best` is the row of best.ckpt's epoch, `tested` are Lightning's test
    metrics, `pruned_epoch` is the one that ended a hopeless run, `commit` is the project's when this process began
    (`project_commit`).
    """
    report = module.count_macs()
    architecture = module.architecture
    network = architecture.to_dict()
    name = module.error_names[0]
    column = f"{module.eval_name}/{name}"
    return {
        "model": architecture.title,
        "base_model": architecture.base_title,
        "data": config.data.name,
        "experiment": trained.experiment,
        "mode": config.mode,
        **{key.removeprefix("test/"): shortened(value) for key, value in tested.items() if key != "test/loss"},
        # Which epoch's model these figures are of: the last, or the best on held-out training images.
        "tested": "checkpoint" if config.mode == "test" else "best" if best and module.eval_name == "valid" else "last",
        f"best_{name}": best and best[column],
        "best_epoch": best and best["epoch"],
        "best_chosen_on": module.eval_name if best else None,
        "pruned_epoch": pruned_epoch,
        "parameters": report.parameters,
        "macs_dense": report.total_dense,
        "macs_roi": report.total_roi,
        # With config.yaml these make the network again, but for its weights.
        **{key: network[key] for key in ("input_size", "num_outputs", "narrowed")},
        "data_source": source,
        "train_images": len(datamodule.train_split),
        "test_images": len(datamodule.data.test),
        "seed": trained.seed,
        "epochs": len(history.rows),
        "wall_seconds": round(history.wall_seconds, 2),
        "train_seconds": round(sum(row["seconds"] for row in history.rows), 2),
        "attention": _attention(trained.attention, clip=config.attention.clip) if module.map_sizes else None,
        "penalty": _penalty(trained.penalty, report) if module.map_sizes else None,
        "rois": _rois(module, report),
        "engine": config.engine if module.map_sizes else None,
        "precision": str(trainer.precision),
        "compiled": config.trainer.compile,
        "fourier": _in_frequencies(config, module, trainer),
        "cuda_graphs": module.cuda_graphs and supports_cuda_graphs(trainer.strategy.root_device),
        "device": _device(trainer),
        "processor": processor_name(),
        "commit": commit,
        "versions": package_versions(*_PACKAGES),
        "target_layers": [
            {
                "name": row.name.removeprefix("model."),
                "map_size": list(row.map_size),
                "macs_dense": row.macs_dense,
                "macs_roi": row.macs_roi,
                "mean_roi": [round(side, 3) for side in row.mean_roi or ()],
            }
            for row in report.target_layers
        ],
    }


def _attention(attention: DictConfig, *, clip: bool) -> dict[str, Any]:
    """The group `attention`, of layers of one rectangle a kernel as earlier versions wrote it."""
    options = {str(key): value for key, value in attention.items() if key not in PLAIN}
    return {**options, "clip": clip, **other_than_plain(dict(attention))}


def _rois(module: TargetedTraining, report: MacsReport) -> dict[str, Any] | None:
    """Where ROIs that do not learn are from, with the multiply-adds that a budget's asked for; None of others."""
    rois = module.identity.get("rois")
    if rois is None:
        return None
    penalty = {key: value for key, value in _penalty(rois["penalty"], report).items() if key != "met"}
    return {**rois, "penalty": penalty}


def _penalty(penalty: Mapping[Any, Any], report: MacsReport) -> dict[str, Any]:
    """The group `penalty`; of a budget with the multiply-adds that were asked for, and those of the network."""
    options: dict[str, Any] = {str(key): value for key, value in penalty.items()}
    if "reach" in options:
        asked = asked_macs(report.total_dense, share=options["share"], macs=options["macs"])
        options |= {"asked": asked, "met": report.total_roi}
    return options


def _in_frequencies(config: DictConfig, module: TargetedTraining, trainer: pl.Trainer) -> bool:
    """Whether any convolution computed, or could, in the frequency domain."""
    used = any(uses_fourier(layer) for layer in module.model.modules())
    return used and not config.trainer.compile and trainer.strategy.root_device.type == "cpu"


def _device(trainer: pl.Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"
