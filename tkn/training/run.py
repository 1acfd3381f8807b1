"""One run: from a configuration to a folder with its summary, metrics, checkpoints and pictures."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from rich.console import Console

from tkn.command import output_folder
from tkn.data import load_data
from tkn.data.base import is_whole
from tkn.data.module import TensorDataModule
from tkn.files import write_whole
from tkn.layers import roi_layers
from tkn.models import build_model
from tkn.report.figures import attention_maps, save_figure, training_curves
from tkn.report.tables import layers_table, results_table
from tkn.training.callbacks import History, LastAndBest, ProgressBar
from tkn.training.checkpoint import check_continuation, identify, load_weights, read_checkpoint
from tkn.training.config import check_config
from tkn.training.module import TargetedTraining
from tkn.training.prune import Prune
from tkn.training.summary import describe_source, summarise

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
    folder = output_folder(output_dir)
    (folder / "summary.json").unlink(missing_ok=True)  # of an earlier run here: this one has not finished
    write_whole(folder / "config.yaml", OmegaConf.to_yaml(config))
    checkpoint_path = Path(config.checkpoint).expanduser() if config.checkpoint else None
    history = History(folder / "metrics.csv")
    checkpoints = LastAndBest(folder, history, continued=checkpoint_path)
    prune = Prune(folder, history, config)
    # Before the data are loaded: it may refuse its arguments.
    trainer = _trainer(config, folder, [history, prune, checkpoints])

    datamodule = _data(config)
    module = _module(config, datamodule)
    checkpoint = read_checkpoint(checkpoint_path, module.identity) if checkpoint_path else None
    if checkpoint is not None and config.mode == "train":
        check_continuation(config.checkpoint, checkpoint, config)
    source = describe_source(datamodule.data.source, config)
    # A log file has no width to fit.
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(layers_table(module.count_macs(), f"{config.model.name} on {config.data.name} ({source})"))
    if module.soft:
        _log.warning(
            "attention.clip=false: the reported error is measured without clipping; the clipped error stands beside it"
        )

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)")  # Lightning's own
            if config.mode == "train":
                trainer.fit(module, datamodule, ckpt_path=checkpoint_path)
                if datamodule.eval_name == "valid":
                    load_weights(module.model, read_checkpoint(checkpoints.best, module.identity))
            elif checkpoint is not None:
                load_weights(module.model, checkpoint)
            tested = trainer.test(module, datamodule, verbose=False)[0]
    except SystemExit:  # Lightning's answer to Ctrl-C
        kept = f": continue with checkpoint={checkpoints.last}" if checkpoints.last.is_file() else ""
        raise KeyboardInterrupt(f"interrupted{kept}") from None

    # A tested network's penalty and seed are those it was trained with.
    trained = OmegaConf.create(checkpoint["tkn"]["config"]) if checkpoint and config.mode == "test" else config
    seconds = time.perf_counter() - started
    summary = summarise(config, trained, source, module, datamodule, history, prune.epoch, tested, trainer, seconds)
    _draw(folder, module, history, summary)
    # Last: a folder with a summary is a finished run.
    write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    console.print(results_table(summary))
    files = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file()))
    console.print(f"in {folder}: {files}", soft_wrap=True, markup=False, highlight=False)
    return summary, {
        "config": config,
        "data": datamodule.data,
        "module": module,
        "trainer": trainer,
        "output_dir": folder,
    }


def _trainer(config: DictConfig, folder: Path, callbacks: list[Callback]) -> pl.Trainer:
    progress = [ProgressBar()] if config.trainer.get("enable_progress_bar") and sys.stdout.isatty() else []
    try:
        return pl.Trainer(
            **{**config.trainer, "enable_progress_bar": bool(progress)},
            default_root_dir=folder,
            callbacks=[*progress, *callbacks],
            logger=_logger(config.logger.name, folder),
            num_sanity_val_steps=0,
            enable_model_summary=False,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ValueError(f"trainer: {error}") from error


def _data(config: DictConfig) -> TensorDataModule:
    options: dict[str, Any] = OmegaConf.to_container(config.data)  # type: ignore[assignment]
    limit, validation = options.pop("limit", None), options.pop("validation", 0)
    data = load_data(options.pop("name"), config.data_dir, **options)
    return TensorDataModule(data, config.recipe.batch_size, limit=limit, validation=validation, seed=config.seed)


def _module(config: DictConfig, datamodule: TensorDataModule) -> TargetedTraining:
    data = datamodule.data
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
        engine=config.engine,
    )
    return TargetedTraining(
        model.to(memory_format=torch.channels_last),  # faster on CPUs and with tensor cores
        data.input_size,
        task=data.task,
        eval_name=datamodule.eval_name,
        penalty=dict(config.penalty),
        recipe=OmegaConf.to_container(config.recipe),  # type: ignore[arg-type]
        seed=config.seed,
        identity=identify(config, data.input_size, data.num_outputs),
    )


def _logger(name: str, folder: Path) -> Logger | bool:
    if name == "csv":
        return False
    try:
        return TensorBoardLogger(folder, name="", version="tensorboard")
    except ModuleNotFoundError as error:
        raise ValueError("logger=tensorboard needs the package tensorboard (the extra 'tensorboard')") from error


def _draw(folder: Path, module: TargetedTraining, history: History, summary: Mapping[str, Any]) -> None:
    title = f"{summary['model']} on {summary['data']}"
    if not is_whole(summary["data_source"]):
        title += f" ({summary['data_source'].split(':')[0]} data)"
    if roi_layers(module.model):
        penalty = summary["penalty"]
        detail = f"{title}: {summary['attention']['name']}, l2 = {penalty['l2']:g}, beta = {penalty['beta']:g}"
        save_figure(attention_maps(module.model, module.map_sizes, detail), folder / "attention_maps.png")  # type: ignore[arg-type]
    if history.rows:
        figure = training_curves(history.rows, module.error_names[0], summary["macs_dense"], title)
        save_figure(figure, folder / "curves.png")
