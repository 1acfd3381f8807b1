"""One run: from a configuration to a folder with its summary, metrics, checkpoints and pictures."""

from __future__ import annotations

import json
import logging
import platform
import sys
import time
import warnings
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from rich.console import Console

from tkn.data import load_data
from tkn.data.module import TensorDataModule
from tkn.files import write_whole
from tkn.layers import roi_layers
from tkn.macs import MacsReport
from tkn.models import build_model
from tkn.report.figures import attention_maps, save_figure, training_curves
from tkn.report.tables import layers_table, results_table
from tkn.training.callbacks import DECIMALS, History, Identity, LastAndBest, ProgressBar
from tkn.training.checkpoint import load_weights, read_checkpoint
from tkn.training.config import check_config
from tkn.training.module import TargetedTraining

_log = logging.getLogger(__name__)


def run(
    config: DictConfig | Mapping[str, Any], output_dir: str | Path | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train and test (mode=train), or only test (mode=test), as `config` says.

    Args:
        config: the composed configuration (`conf/`).
        output_dir: the run's folder; by default Hydra's, or outputs/<date>/<time> outside of Hydra.

    Returns (metrics, objects): the content of summary.json; and the "config", "data", "module", "trainer" and
    "output_dir". ValueError or OSError, one line each, for what the user can mend.
    """
    started = time.perf_counter()
    config = check_config(config if isinstance(config, DictConfig) else OmegaConf.create(dict(config)))
    folder = _output_folder(output_dir)
    write_whole(folder / "config.yaml", OmegaConf.to_yaml(config))

    options: dict[str, Any] = OmegaConf.to_container(config.data)  # type: ignore[assignment]
    limit, validation = options.pop("limit", None), options.pop("validation", 0)
    data = load_data(options.pop("name"), config.data_dir, **options)
    datamodule = TensorDataModule(data, config.recipe.batch_size, limit=limit, validation=validation, seed=config.seed)

    pl.seed_everything(config.seed, verbose=False)
    model = build_model(
        config.model.name,
        data.input_size,
        data.num_outputs,
        dropout=config.model.dropout,
        attention=config.attention.name,
        scale_unit=config.attention.scale_unit,
        min_size=config.attention.min_size,
        clip=config.attention.clip,
    )
    module = TargetedTraining(
        model.to(memory_format=torch.channels_last),  # faster on CPUs and with tensor cores
        data.input_size,
        task=data.task,
        eval_name=datamodule.eval_name,
        penalty=dict(config.penalty),
        recipe=OmegaConf.to_container(config.recipe),  # type: ignore[arg-type]
        seed=config.seed,
    )
    identity = {
        "model": config.model.name,
        "input_size": list(data.input_size),
        "num_outputs": data.num_outputs,
        "attention": {"name": config.attention.name, "scale_unit": config.attention.scale_unit}
        if module.map_sizes
        else None,
    }
    checkpoint = read_checkpoint(config.checkpoint, identity) if config.checkpoint else None
    history = History(folder / "metrics.csv")
    # A log file has no width to fit.
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(layers_table(module.count_macs(), f"{config.model.name} on {data.name} ({data.source})"))
    if module.soft:
        _log.warning(
            "attention.clip=false: the reported error is measured without clipping; the clipped error stands beside it"
        )

    monitor = f"{datamodule.eval_name}/{module.error_names[0]}"
    checkpoints = LastAndBest(folder, history, monitor, continued=config.checkpoint)
    progress = [ProgressBar()] if config.trainer.get("enable_progress_bar") and sys.stdout.isatty() else []
    trainer = pl.Trainer(
        **{**config.trainer, "enable_progress_bar": bool(progress)},
        default_root_dir=folder,
        callbacks=[*progress, history, Identity(identity), checkpoints],
        logger=_logger(config.logger.name, folder),
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)")  # Lightning's own
        if config.mode == "train":
            trainer.fit(module, datamodule, ckpt_path=config.checkpoint)
            if datamodule.eval_name == "valid":
                load_weights(model, read_checkpoint(checkpoints.best, identity))
        else:
            assert checkpoint is not None
            load_weights(model, checkpoint)
        tested = trainer.test(module, datamodule, verbose=False)[0]

    summary = _summary(config, data.source, module, history, tested, trainer)
    summary["wall_seconds"] = round(time.perf_counter() - started, 2)
    _draw(folder, module, history, summary)
    # Last: a folder with a summary is a finished run.
    write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    console.print(results_table(summary))
    console.print(f"in {folder}: {', '.join(sorted(p.name for p in folder.iterdir() if p.is_file()))}", soft_wrap=True)
    return summary, {
        "config": config,
        "data": data,
        "module": module,
        "trainer": trainer,
        "output_dir": folder,
    }


def _output_folder(output_dir: str | Path | None) -> Path:
    if output_dir is None and HydraConfig.initialized():
        output_dir = HydraConfig.get().runtime.output_dir
    if output_dir is None:
        output_dir = f"outputs/{datetime.now():%Y-%m-%d/%H-%M-%S}"
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _logger(name: str, folder: Path) -> Logger | bool:
    if name == "csv":
        return False
    try:
        return TensorBoardLogger(folder, name="", version="tensorboard")
    except ModuleNotFoundError as error:
        raise ValueError("logger=tensorboard needs the package tensorboard (the extra 'tensorboard')") from error


def _summary(
    config: DictConfig,
    source: str,
    module: TargetedTraining,
    history: History,
    tested: Mapping[str, float],
    trainer: pl.Trainer,
) -> dict[str, Any]:
    report: MacsReport = module.count_macs()
    name = module.error_names[0]
    column = f"{module.eval_name}/{name}"
    best = min(history.rows, key=lambda row: row[column]) if history.rows else None
    return {
        "model": config.model.name,
        "data": config.data.name,
        "experiment": config.experiment,
        "mode": config.mode,
        **{key.removeprefix("test/"): round(value, DECIMALS) for key, value in tested.items() if key != "test/loss"},
        # Which epoch's model these figures are of: the last, or the best on held-out training images.
        "tested": "checkpoint" if config.mode == "test" else "best" if module.eval_name == "valid" else "last",
        f"best_{name}": best and best[column],
        "best_epoch": best and best["epoch"],
        "best_chosen_on": module.eval_name if best else None,
        "parameters": report.parameters,
        "macs_dense": report.total_dense,
        "macs_roi": report.total_roi,
        "data_source": source,
        "seed": config.seed,
        "epochs": len(history.rows),
        "wall_seconds": 0.0,
        "train_seconds": round(sum(row["seconds"] for row in history.rows), 2),
        "attention": dict(config.attention) if module.map_sizes else None,
        "penalty": dict(config.penalty) if module.map_sizes else None,
        "precision": str(trainer.precision),
        "device": _device(trainer),
        "versions": _versions(),
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


def _device(trainer: pl.Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"


def _versions() -> dict[str, str]:
    names = {"tkn": "targeted-kernel-networks"} | {
        name: name for name in ("torch", "torchvision", "pytorch-lightning", "hydra-core", "numpy")
    }
    versions = {"python": platform.python_version()}
    for short, package in names.items():
        try:
            versions[short] = version(package)
        except PackageNotFoundError:  # run from a checkout that was not installed
            versions[short] = "not installed"
    return versions


def _draw(folder: Path, module: TargetedTraining, history: History, summary: Mapping[str, Any]) -> None:
    title = f"{summary['model']} on {summary['data']}"
    if not summary["data_source"].startswith("full"):
        title += f" ({summary['data_source'].split(':')[0]} data)"
    if roi_layers(module.model):
        penalty = summary["penalty"]
        detail = f"{title}: {summary['attention']['name']}, l2 = {penalty['l2']:g}, beta = {penalty['beta']:g}"
        save_figure(attention_maps(module.model, module.map_sizes, detail), folder / "attention_maps.png")  # type: ignore[arg-type]
    if history.rows:
        figure = training_curves(history.rows, module.error_names[0], summary["macs_dense"], title)
        save_figure(figure, folder / "curves.png")
