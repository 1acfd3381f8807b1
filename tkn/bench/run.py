"""A benchmark: from a configuration to a folder with its timings, table and plot."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from tkn.app.command import output_folder
from tkn.app.files import write_whole
from tkn.app.versions import package_versions
from tkn.bench.alone import alone
from tkn.bench.config import check_config, place_of
from tkn.bench.engines import TIMED_ENGINES, Prepared, prepare_inference, prepare_training
from tkn.bench.machine import describe_device, describe_machine, load_average
from tkn.bench.measure import Sampling
from tkn.bench.memory import MEASURED, measure_memory
from tkn.bench.networks import Network, build_networks, fill_case, images_and_labels
from tkn.bench.report import cost_figure, memory_table, speedups_table, timings_table
from tkn.bench.rows import PEERS, reason, significant, time_rows
from tkn.bench.speedups import speedups
from tkn.drawing.figures import save_figure
from tkn.load import OtherLoad

_log = logging.getLogger(__name__)

#: CPUs kept busy by others, on average, beyond which timings are doubtful.
_BUSY = 0.1
#: The same for the part of the median that lies between the quartiles.
_SPREAD = 0.2


def bench(config: DictConfig | Mapping[str, Any], output_dir: str | Path | None = None) -> dict[str, Any]:
    """Time what `config` (conf/bench) names, print it, and write bench.json, bench.png and bench.pdf.

    Args:
        output_dir: the benchmark's folder; by default Hydra's, or outputs/<date>/<time> outside of Hydra.

    Returns the content of bench.json, which docs/benchmarks.md explains. An engine that is missing, fails or computes
    something else than torch is reported in it. ValueError or OSError, one line each, for what the user can mend.
    """
    config = fill_case(check_config(config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))))
    networks = list(build_networks(config))
    folder = output_folder(output_dir)
    (folder / "bench.json").unlink(missing_ok=True)  # of an earlier run here: this one has not finished
    config_path = folder / "config.yaml"
    write_whole(config_path, OmegaConf.to_yaml(config))
    with (
        alone(),
        _threads(config.threads) as threads,
        torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False),
    ):
        result = _header(config, networks, threads)
        if (load := result["load_average"]["start"]) is not None and load > 0.5:
            _warn(result, f"the load average was {load} at the start: something else was running")
        others = OtherLoad()
        for task, batch in _tasks(config):
            result["timings"] += _time_task(task, batch, networks, config, threads, others)
            result["speedups"] = speedups(result["timings"])
            _write(folder, result)  # so that an interrupted benchmark keeps what it has
        if config.memory:
            result["memory"] = _memory(config, config_path, networks)
        _finish(result, others)

    for suffix in ("png", "pdf"):
        save_figure(cost_figure(result), folder / f"bench.{suffix}")
    _write(folder, result)
    # A log file has no width to fit.
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(timings_table(result))
    for text in _remarks(result):
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if result["speedups"]:
        console.print(speedups_table(result))
    if result["memory"]:
        console.print(memory_table(result))
    files = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file()))
    console.print(f"in {folder}: {files}", soft_wrap=True, markup=False, highlight=False)
    return result


@contextmanager
def _threads(wanted: int | None) -> Iterator[int]:
    """torch's number of threads, set to `wanted` within the context unless that is None."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _header(config: DictConfig, networks: list[Network], threads: int) -> dict[str, Any]:
    return {
        "case": config.case.name,
        "complete": False,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "input_size": list(config.case.input_size),
        "threads": threads,
        "seed": config.seed,
        "measure": dict(config.measure),
        "machine": describe_machine(),
        "device": describe_device(place_of(config).device),
        "dtype": config.dtype,
        "versions": package_versions("torch", "numpy", "triton", *PEERS),
        "load_average": {"start": load_average(), "end": None},
        "busy_with_others": None,
        "networks": [
            {
                "name": network.name,
                "kind": network.kind,
                "model": config.case.targeted if network.kind == "targeted" else config.case.baseline,
                "macs": network.macs,
                "share": round(network.share, 4),
                "parameters": network.parameters,
                "rois": network.rois,
            }
            for network in networks
        ],
        "timings": [],
        "speedups": [],
        "memory": [],
        "warnings": [],
    }


def _tasks(config: DictConfig) -> Iterator[tuple[str, int]]:
    for batch in config.batch_sizes:
        yield "inference", batch
    for batch in config.train_batch_sizes:
        yield "training", batch


def _time_task(
    task: str, batch: int, networks: list[Network], config: DictConfig, threads: int, others: OtherLoad
) -> list[dict[str, Any]]:
    """A row for every network and engine that can do the task."""
    torch.compiler.reset()  # compilations for other batch sizes would count as too many
    images, labels = images_and_labels(config, batch)
    place = place_of(config)
    rows: dict[str, dict[str, Any]] = {}
    preparations: dict[str, Callable[[], Prepared]] = {}
    for network in networks:
        for name in config.engines:
            engine = TIMED_ENGINES[name]
            able = engine.infer if task == "inference" else engine.train
            if (
                able is None
                or place.device.type not in engine.devices
                or engine.targeted != (network.kind == "targeted")
                or not engine.applies_to(network.model)
            ):
                continue
            key = f"{network.name}, {name}"
            rows[key] = {"task": task, "batch": batch, "network": network.name, "engine": name, "macs": network.macs}
            if task == "inference":
                preparations[key] = partial(prepare_inference, engine, network.model, images, threads, place)
            else:
                preparations[key] = partial(prepare_training, engine, network.model, images, labels, place)
    _log.info("%s at batch %s", task, batch)
    time_rows(
        rows,
        preparations,
        Sampling(**config.measure),
        config.seed,
        others,
        inference=task == "inference",
        on_gpu=place.device.type == "cuda",
    )
    for row in rows.values():
        if "seconds" in row:
            row["seconds_per_image"] = significant(row["seconds"]["median"] / batch)
    return list(rows.values())


def _memory(config: DictConfig, config_path: Path, networks: list[Network]) -> list[dict[str, Any]]:
    batch = max(config.batch_sizes)
    rows: list[dict[str, Any]] = []
    for network in networks:
        for name in MEASURED:
            if name not in config.engines or TIMED_ENGINES[name].targeted != (network.kind == "targeted"):
                continue
            _log.info("memory at batch %s: %s, %s", batch, network.name, name)
            row: dict[str, Any] = {"network": network.name, "engine": name, "batch": batch}
            try:
                row |= measure_memory(config_path, network.name, name, batch)
            except Exception as error:
                row["failure"] = reason(error)
            rows.append(row)
    return rows


def _finish(result: dict[str, Any], others: OtherLoad) -> None:
    """Note the state of the machine at the end, and what makes the timings doubtful."""
    result["busy_with_others"] = others.mean()
    result["load_average"]["end"] = end = load_average()
    if (busy := result["busy_with_others"]) is not None and busy > _BUSY:
        _warn(result, f"{busy} CPUs were busy with something else, on average")
    if end is not None and end > result["threads"] + 0.5:
        _warn(result, f"the load average was {end} at the end, with {result['threads']} threads of this benchmark")
    if result["machine"]["usable_cpus"] < result["threads"]:
        _warn(result, f"{result['threads']} threads shared {result['machine']['usable_cpus']} CPUs")
    timed = [row["seconds"] for row in result["timings"] if "seconds" in row]
    wide = [row for row in timed if row["q3"] - row["q1"] > _SPREAD * row["median"]]
    if wide:
        _warn(result, f"{len(wide)} of {len(timed)} timings have quartiles more than {_SPREAD:.0%} apart")
    result["complete"] = True


def _warn(result: dict[str, Any], message: str) -> None:
    _log.warning(message)
    result["warnings"].append(message)


def _remarks(result: Mapping[str, Any]) -> list[str]:
    """A line for each way in which an engine failed, and for each note: on which networks, and in which tasks."""
    lines: dict[tuple[str, str], dict[str, dict[str, None]]] = {}
    for row in [*result["timings"], *result["memory"]]:
        for text in [f"failed: {row['failure']}"] if "failure" in row else row.get("notes", ()):
            where = lines.setdefault((row["engine"], text), {}).setdefault(row["network"], {})
            where[f"{row.get('task', 'memory')} {row['batch']}"] = None
    return [
        f"{engine}: {text} ({'; '.join(f'{network}, ' + ', '.join(tasks) for network, tasks in where.items())})"
        for (engine, text), where in lines.items()
    ]


def _write(folder: Path, result: Mapping[str, Any]) -> None:
    """Write bench.json: a line for every key, and for every row of a table."""
    lines = []
    for key, value in result.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
            lines.append(f" {json.dumps(key)}: [\n{rows}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    write_whole(folder / "bench.json", "{\n" + ",\n".join(lines) + "\n}\n")
