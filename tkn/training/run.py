"""One run: from a configuration to a folder with its summary, metrics, checkpoints and pictures."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from rich.console import Console

from tkn.app.command import output_folder
from tkn.app.files import own_folder, write_whole
from tkn.app.memory import keep_freed_memory
from tkn.app.signals import Interrupted, Signals
from tkn.app.versions import project_commit
from tkn.backends.torch.fourier import use_fourier
from tkn.data import load_data, loader_options
from tkn.data.base import DataSet
from tkn.drawing.figures import attention_maps, save_figure, training_curves
from tkn.drawing.tables import layers_table, results_table
from tkn.layers import roi_layers
from tkn.models.densenet import trains_on_contiguous_maps
from tkn.training.batches import TensorDataModule
from tkn.training.config import LIGHTNING_KEYS, check_config
from tkn.training.cuda_graphs import may_capture
from tkn.training.loggers.log import RunLog
from tkn.training.loggers.trackers import open_log
from tkn.training.module import TargetedTraining
from tkn.training.networks import architecture_of, check_rois, start_network
from tkn.training.outputs import start_at_
from tkn.training.processes import run_processes
from tkn.training.progress import ProgressBar
from tkn.training.prune import Prune
from tkn.training.records.checkpoint import (
    check_continuation,
    identify,
    load_weights,
    read_checkpoint,
    require_same_thinning,
)
from tkn.training.records.earlier import earlier_run
from tkn.training.records.history import History
from tkn.training.records.roi_history import RoiHistory
from tkn.training.records.saving import LastAndBest, WholeFiles
from tkn.training.records.summary import describe_source, run_title, summarise

_log = logging.getLogger(__name__)


def run(
    config: DictConfig | Mapping[str, Any], output_dir: str | Path | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train and test (mode=train), or only test (mode=test), as `config` says.

    A folder that holds a finished run of the same configuration is left as it is, and an unfinished run is continued.

    Args:
        config: the composed configuration (`conf/`).
        output_dir: the run's folder; by default Hydra's, or outputs/<date>/<time> outside of Hydra.

    Returns (metrics, objects): the content of summary.json; and the "config", "output_dir" and, of a run that was made
    in this process (not finished before, not in several processes), the "data", "module" and "trainer". ValueError or
    OSError, one line each, for what the user can mend; `tkn.app.signals.Interrupted` on SIGINT and SIGTERM.
    """
    config = check_config(config if isinstance(config, DictConfig) else OmegaConf.create(dict(config)))
    folder = output_folder(output_dir)
    objects = {"config": config, "output_dir": folder}
    try:
        with own_folder(folder):
            earlier = earlier_run(folder, config)
            if earlier.summary is not None:
                _log.info("%s holds this run, finished: it is not run again", folder)
                return earlier.summary, objects
            if earlier.checkpoint is not None:
                _log.info("%s holds an unfinished run: going on with it", folder)
            continued = earlier.checkpoint or (Path(config.checkpoint).expanduser() if config.checkpoint else None)
            (folder / "summary.json").unlink(missing_ok=True)  # of an earlier run here: this one has not finished
            write_whole(folder / "config.yaml", OmegaConf.to_yaml(config))
            if config.trainer.devices > 1:
                task = partial(_run_in_group, continued=continued)
                return run_processes(task, config, folder, config.trainer.devices), objects
            with Signals() as signals:
                summary, made = _run(config, folder, continued, signals)
            return summary, {**objects, **made}
    except Interrupted as interrupted:
        if (folder / "last.ckpt").is_file():
            interrupted.message += f": the same command with {_folder_override(folder)} continues it"
        raise


def _run_in_group(config: DictConfig, folder: Path, rank: int, *, continued: Path | None) -> dict[str, Any]:
    """The run as each of several processes does it."""
    keep_freed_memory()  # of a process that is there for the run alone
    with Signals() as signals:
        return _run(config, folder, continued, signals, rank)[0]


def _run(
    config: DictConfig, folder: Path, continued: Path | None, signals: Signals, rank: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(summary, objects) of a run, in the process `rank` of those that do it; the first one writes.

    `continued`: the checkpoint to go on from, or to test.
    """
    history = History(folder / "metrics.csv")
    with open_log(config, folder, history) if rank == 0 else nullcontext() as log:
        return _train_and_test(config, folder, history, log, continued, signals, rank)


def _train_and_test(
    config: DictConfig,
    folder: Path,
    history: History,
    log: RunLog | None,
    continued: Path | None,
    signals: Signals,
    rank: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    commit = project_commit()  # now, for the checkout may change while this runs
    checkpoints = LastAndBest(folder, history, continued, signals)
    prune = Prune(folder, history, config)
    # Before the data are loaded: it may refuse its arguments.
    callbacks = [history, RoiHistory(folder / "rois.npz"), *([log] if log else []), prune, checkpoints]
    trainer = _trainer(config, folder, callbacks, rank)

    if continued is None:
        check_rois(config)
    datamodule = _data(config)
    checkpoint = _checkpoint(config, datamodule.data, continued) if continued else None
    module = _module(config, datamodule, checkpoint, trainer.strategy.root_device)
    source = describe_source(datamodule.data.source, config)
    # A log file has no width to fit.
    console = Console(width=None if sys.stdout.isatty() else 120, quiet=rank > 0)
    console.print(layers_table(module.count_macs(), f"{module.architecture.title} on {config.data.name} ({source})"))
    if module.soft:
        _log.warning(
            "attention.clip=false: the reported error is measured without clipping; the clipped error stands beside it"
        )

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)")  # Lightning's own
            warnings.filterwarnings("ignore", message="`training_step` returned `None`")  # where a graph did it all
            if config.mode == "train":
                trainer.fit(module, datamodule, ckpt_path=continued)
                # There is none of a run that ended before it met its budget.
                if datamodule.eval_name == "valid" and checkpoints.best.is_file():
                    load_weights(module.model, read_checkpoint(checkpoints.best, module.architecture))
            elif checkpoint is not None:
                load_weights(module.model, checkpoint)
            tested = trainer.test(module, datamodule, verbose=False)[0]
    except OSError:
        if checkpoints.last.is_file():
            _log.error("the run ends; its last good checkpoint is %s", checkpoints.last)
        raise

    # A tested network's penalty and seed are those it was trained with.
    trained = OmegaConf.create(checkpoint["tkn"]["config"]) if checkpoint and config.mode == "test" else config
    best = checkpoints.best_row
    summary = summarise(
        config, trained, source, module, datamodule, history, best, prune.epoch, tested, trainer, commit
    )
    if rank == 0:
        _draw(folder, module, history, summary)
        if log is not None:
            log.finish(module, summary)
        # Last: a folder with a summary is a finished run.
        write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        console.print(results_table(summary))
        shown = (path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        files = ", ".join(sorted(shown))
        console.print(f"in {folder}: {files}", soft_wrap=True, markup=False, highlight=False)
    return summary, {"data": datamodule.data, "module": module, "trainer": trainer}


def _folder_override(folder: Path) -> str:
    """What the command needs to come to the same folder again."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return f"hydra.sweep.dir={HydraConfig.get().sweep.dir}"
    here = Path.cwd()
    return f"hydra.run.dir={folder.relative_to(here) if folder.is_relative_to(here) else folder}"


def _trainer(config: DictConfig, folder: Path, callbacks: list[Callback], rank: int) -> pl.Trainer:
    wanted = config.trainer.get("enable_progress_bar") and sys.stdout.isatty() and rank == 0
    progress = [ProgressBar()] if wanted else []
    arguments: dict[str, Any] = {key: config.trainer[key] for key in LIGHTNING_KEYS if key in config.trainer}
    try:
        return pl.Trainer(
            **{**arguments, "enable_progress_bar": bool(progress)},
            # Not what a scheduler's variables suggest: a run starts its processes itself.
            plugins=[LightningEnvironment(), WholeFiles()],
            default_root_dir=folder,
            callbacks=[*progress, *callbacks],
            logger=False,
            num_sanity_val_steps=0,
            enable_model_summary=False,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ValueError(f"trainer: {error}") from error


def _data(config: DictConfig) -> TensorDataModule:
    options: dict[str, Any] = OmegaConf.to_container(config.data)  # type: ignore[assignment]
    data = load_data(config.data.name, config.data_dir, **loader_options(options))
    if data.task == "regression" and config.recipe.label_smoothing:
        raise ValueError(
            f"recipe.label_smoothing={config.recipe.label_smoothing} must be 0: a regression has no labels"
        )
    return TensorDataModule(
        data,
        config.recipe.batch_size,
        limit=options.get("limit"),
        validation=options.get("validation", 0),
        seed=config.seed,
    )


def _checkpoint(config: DictConfig, data: DataSet, path: Path) -> dict[str, Any]:
    """The checkpoint that is continued or tested, if it is of the configuration's network, and can be."""
    checkpoint = read_checkpoint(path, architecture_of(config, data.input_size, data.num_outputs))
    require_same_thinning(path, checkpoint, config)
    if config.mode == "train":
        check_continuation(str(path), checkpoint, config)
    return checkpoint


def _module(
    config: DictConfig, datamodule: TensorDataModule, checkpoint: dict[str, Any] | None, device: torch.device
) -> TargetedTraining:
    data = datamodule.data
    pl.seed_everything(config.seed, verbose=False)
    start = start_network(config, data.input_size, data.num_outputs, checkpoint)
    if data.task == "regression" and checkpoint is None and config.channels.checkpoint is None:
        start_at_(start.model, data.input_size, datamodule.train_split.targets, frozenset(start.pretrained))
    if config.trainer.fourier:
        use_fourier(start.model)
    recipe: dict[str, Any] = OmegaConf.to_container(config.recipe)  # type: ignore[assignment]
    if config.channels.checkpoint is not None:
        recipe["optimizer"]["lr"] *= config.channels.lr_factor
    autocast = torch.bfloat16 if config.trainer.precision == "bf16-mixed" else None
    if trains_on_contiguous_maps(start.model, device, autocast):
        datamodule.memory_format = torch.contiguous_format
    module = TargetedTraining(
        start.model.to(memory_format=datamodule.memory_format),
        data.input_size,
        task=data.task,
        eval_name=datamodule.eval_name,
        penalty=dict(config.penalty),
        recipe=recipe,
        identity=identify(config, start.architecture, start.pretrained, start.rois),
        frozen=start.frozen,
        pretrained=start.pretrained,
        pretrained_lr_factor=config.model.get("pretrained_lr_factor"),
        cuda_graphs=may_capture(config.trainer),
    )
    if config.trainer.compile:
        for network in {module.model, module.learning}:
            # One compilation for each size of batches: those for all sizes are slower.
            # Torch's random numbers, not the compiler's own: dropout is then that of an uncompiled run.
            network.compile(dynamic=False, options={"fallback_random": True})
    return module


def _draw(folder: Path, module: TargetedTraining, history: History, summary: Mapping[str, Any]) -> None:
    title = run_title(summary["model"], summary["data"], summary["data_source"])
    if roi_layers(module.model):
        detail = f"{title}: {summary['attention']['name']}, {_describe(summary)}"
        save_figure(attention_maps(module.model, module.map_sizes, detail), folder / "attention_maps.png")  # type: ignore[arg-type]
    if history.rows:
        figure = training_curves(history.rows, module.error_names[0], summary["macs_dense"], title)
        save_figure(figure, folder / "curves.png")


def _describe(summary: Mapping[str, Any]) -> str:
    """What made the ROIs."""
    if summary["rois"] is not None:
        return f"{summary['rois']['places']} ROIs, fixed"
    penalty = summary["penalty"]
    if "reach" in penalty:
        return f"budget = {penalty['asked'] / 1e6:.3g}M multiply-adds"
    return f"l2 = {penalty['l2']:g}, beta = {penalty['beta']:g}"
