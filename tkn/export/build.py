"""From a finished run to its plan's file and its table."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tkn.app.files import whole_file, write_whole
from tkn.app.messages import printable
from tkn.app.versions import package_versions
from tkn.bench.machine import describe_machine
from tkn.data import load_data, loader_options
from tkn.data.base import DataSet
from tkn.export.check import Outcome, outcomes, random_batch, test_images
from tkn.export.finished import Finished, Trust, read_finished, require_trust
from tkn.export.tables import export_lines, export_markdown, export_sheet
from tkn.export.timing import time_all
from tkn.layers import roi_layers
from tkn.load import OtherLoad
from tkn.plan.compare import TOLERANCES
from tkn.plan.place import Place
from tkn.plan.plan import accelerate, load_plan
from tkn.report.tables.formats import terminal_table


@dataclass(frozen=True)
class Options:
    """output: the plan's file; batches: what it is checked and timed for; images: so many test images, None: all.

    data_dir: where the data sets are, of own data the folder itself; None: what TKN_DATA_DIR says, else where the run
        found them.
    trust: asked before code that the run names is run.
    checked: False exports without the data; seconds: how long each network is timed at least, at each batch size.
    """

    output: Path
    data_dir: Path | None
    trust: Trust
    batches: tuple[int, ...] = (1, 128)
    dtype: torch.dtype = torch.float32
    images: int | None = None
    checked: bool = True
    seconds: float = 1.0


def export(folder: Path, options: Options, console: Console) -> dict[str, Any]:
    """Write the plan of the run in `folder`, and export.json and export.md beside it; print the table.

    Returns the content of export.json. ValueError or OSError, one line each, for a run that can't be exported or
    checked, and for a plan that is not its network; then nothing is written.
    """
    Place.of("cpu", options.dtype)  # or an error, before anything is read
    finished = read_finished(folder, options.trust)
    data = _data(finished, options) if options.checked else None
    images = test_images(data, options.images) if data else random_batch(finished.input_size)
    plan = accelerate(
        finished.network,
        options.batches[0],
        finished.input_size,
        classes=list(data.classes) if data and data.classes else None,
        preprocessing=_preparation(data),
    )
    with whole_file(options.output) as temporary:
        plan.save(temporary)
        # What is checked and timed is what a user of the file gets.
        plans = {size: load_plan(temporary, batch_size=size, dtype=options.dtype) for size in options.batches}
        network, planned = outcomes(finished.network, plans, images)
        if data is not None and options.images is None:
            _require_same_error(finished, network)
        _require_near(planned, options.dtype)
        load = OtherLoad()
        with load:
            timings, notes = time_all(finished.network, plans, finished.input_size, options.seconds, options.dtype)
        notes += [f"torch computes {layer}, which the engine does not know." for layer in plan.fallbacks]
        content = {
            **_header(finished, options),
            "images": {"count": images.count, "whole": len(data.test) if data else None, "source": images.source},
            "network": {"errors": _errors(network)},
            "plans": [_planned(size, outcome) for size, outcome in planned.items()],
            "timings": timings,
            "other_load": load.mean(),
            "notes": [*_preparation_notes(data), *notes],
        }
    write_whole(options.output.with_name("export.json"), json.dumps(content, indent=2) + "\n")
    write_whole(options.output.with_name("export.md"), export_markdown(content))
    console.print(terminal_table(export_sheet(content)))
    for line in map(printable, export_lines(content)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return content


def _data(finished: Finished, options: Options) -> DataSet:
    """The data set of the run's training. ValueError or FileNotFoundError if it, or the same of it, is not there."""
    config, summary = finished.identity["config"], finished.run.result
    arguments = loader_options(config["data"])
    if "source" in arguments and "embedded: " in summary["data_source"]:
        arguments["source"] = "embedded"
    if "path" in arguments and options.data_dir is not None:
        arguments["path"] = str(options.data_dir)
    if "factory" in arguments:
        require_trust(finished.run.folder, arguments["factory"], options.trust)
    hint = "tell where the data are by --data-dir, or export without them by --unchecked"
    try:
        folder = options.data_dir or os.environ.get("TKN_DATA_DIR", config["data_dir"])
        data = load_data(config["data"]["name"], folder, **arguments)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the plan can't be checked: {error}; {hint}") from error
    network = (finished.input_size, finished.identity["num_outputs"])
    for what, here, theirs in (
        ("input size and outputs", (data.input_size, data.num_outputs), network),
        ("test images", len(data.test), summary.get("test_images", len(data.test))),
    ):
        if here != theirs:
            raise ValueError(
                f"the plan can't be checked: the {what} of {data.source} are {here}, of the run {theirs}; {hint}"
            )
    return data


def _require_same_error(finished: Finished, network: Outcome) -> None:
    """ValueError if the run's own error is outside the interval of the one found here.

    On the same images they differ by rounding alone.
    """
    summary = finished.run.result
    if "limit_test_batches" in summary["data_source"]:
        return
    for name, here in network.errors.items():
        told = summary.get(f"{name}_clipped", summary[name])
        rounding = 1e-5 * abs(told)  # sums of float32
        if not here.low - rounding <= told <= here.high + rounding:
            raise ValueError(
                f"{finished.checkpoint} has {name} {here.value:.3f} on {finished.run.result['data']}, but summary.json "
                f"says {told:.3f}: other data, or another checkpoint"
            )


def _require_near(planned: Mapping[int, Outcome], dtype: torch.dtype) -> None:
    for size, outcome in planned.items():
        if not outcome.difference <= TOLERANCES[dtype]:  # NaN too
            raise ValueError(
                f"the plan for batches of {size} differs from its network by {outcome.difference:.1e} of the largest "
                f"output, more than {TOLERANCES[dtype]:g}: nothing is written"
            )


def _header(finished: Finished, options: Options) -> dict[str, Any]:
    return {
        "run": finished.run.folder.resolve().name,
        "checkpoint": finished.checkpoint.name,
        "model": finished.run.result["model"],
        "data": finished.run.result["data"],
        "plan": options.output.name,
        "dtype": str(options.dtype).removeprefix("torch."),
        "targeted": bool(roi_layers(finished.network)),
        "parameters": finished.macs.parameters,
        "macs_dense": finished.macs.total_dense,
        "macs_roi": finished.macs.total_roi,
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "versions": package_versions("torch", "openvino"),
    }


def _errors(outcome: Outcome) -> dict[str, Any]:
    return {name: asdict(estimate) for name, estimate in outcome.errors.items()}


def _planned(batch: int, outcome: Outcome) -> dict[str, Any]:
    return {
        "batch": batch,
        "errors": _errors(outcome),
        "largest_difference": outcome.absolute,
        "difference": outcome.difference,
        "other_classes": outcome.others,
    }


def _preparation(data: DataSet | None) -> dict[str, Any] | None:
    """How images are prepared; None where it is unknown, or the file would be taken for a classification's."""
    if data is None or data.preparation is None or _several_numbers(data):
        return None
    return data.preparation.to_dict()


def _several_numbers(data: DataSet) -> bool:
    """Whether it is a regression of several outputs, which a plan's file does not tell from classes without names."""
    return data.task == "regression" and data.num_outputs > 1


def _preparation_notes(data: DataSet | None) -> Sequence[str]:
    if data is None:
        return ["The error is unknown, and the file does not say how images are prepared: the data were not there."]
    if data.preparation is None:
        return [f"The file does not say how images are prepared: {data.name} needs more than an image (tkn.load_plan)."]
    if _several_numbers(data):
        return [
            f"The file does not say how images are prepared: tkn-predict tells a class or one number, and {data.name} "
            f"has {data.num_outputs} numbers (tkn.load_plan)."
        ]
    return []
