"""Times the networks of the comparison that were run: python benchmarks/pays.py RESULTS FOLDER [SET ...]

Of each set the networks of its rows' first seeds that have a checkpoint; without one, the network of the first that can
be made again, with the widths and ROIs recorded there and random weights, which take the same time. In float32, one
image and 128, each by this project's plan, by OpenVINO and by eager torch in both memory formats, all networks of a set
in turns in one process. Writes FOLDER/pays_<set>.json, which `python -m tkn.report.pays` reads. Leave the machine alone
meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tkn.app.files import write_whole
from tkn.app.messages import first_line, unknown
from tkn.app.versions import package_versions
from tkn.bench.alone import alone
from tkn.bench.engines import TIMED_ENGINES, Prepared, prepare_inference
from tkn.bench.machine import describe_machine
from tkn.bench.measure import Sampling
from tkn.bench.networks import settle_norms
from tkn.bench.rows import time_rows
from tkn.layers import roi_layers
from tkn.load import OtherLoad
from tkn.macs import count_macs
from tkn.report.pays.design import SETS
from tkn.report.pays.rows import read_row, where
from tkn.report.pays.timings import BATCHES, timings_path
from tkn.report.runs.groups import Group
from tkn.report.runs.networks import remade_network
from tkn.report.runs.roi_states import checkpoint_path
from tkn.report.runs.run import Run
from tkn.training.records.checkpoint import checkpoint_network

ARMS = ("dense", "thin", "pruned", "targeted", "converted")
DENSE = ("tkn-dense", "openvino", "torch", "torch-channels-last")
TARGETED = ("tkn", "openvino", "torch-masked", "torch-masked-channels-last")


def factory_of(run: Run) -> str | None:
    """The function that made the network, if it is one of the project's; ValueError for another's."""
    name = (run.config or {}).get("model.factory")
    if name is not None and not name.startswith("tkn."):
        raise ValueError(f"{run.name} is made by {name}, which is not of this project")
    return name


def network_of(run: Run, seed: int) -> tuple[nn.Module, tuple[int, ...], str]:
    """The run's network, its input's size, and what its weights are."""
    path = checkpoint_path(run)
    if path.exists():
        model, identity = checkpoint_network(path, factory=factory_of(run))
        return model, tuple(identity["input_size"]), "trained"
    torch.manual_seed(seed)
    model, size = remade_network(run, factory_of(run)), tuple(run.result["input_size"])
    settle_norms(model, size)
    return model, size, "random"


def _timed_run(group: Group) -> Run:
    """The first with a checkpoint, else the first whose summary says what its network was made for, else the first."""
    kept = [run for run in group.runs if checkpoint_path(run).exists()]
    told = [run for run in group.runs if "input_size" in run.result]
    return [*kept, *told, group.first][0]


def time_set(name: str, results: Path, sampling: Sampling) -> dict[str, Any] | None:
    """The content of the set's file; None if none of its networks was run."""
    networks: dict[str, nn.Module] = {}
    rows: list[dict[str, Any]] = []
    sizes = set()
    for seed, arm in enumerate(ARMS):
        group = read_row(results, SETS[name].experiment(arm)).group
        if group is None:
            print(f"{name}: {arm} was not run", flush=True)
            continue
        run = _timed_run(group)
        networks[arm], size, weights = network_of(run, seed)
        sizes.add(size)
        report = count_macs(networks[arm], size)
        if report.total_roi != run.result["macs_roi"]:
            raise ValueError(f"{run.name} has {run.result['macs_roi']} multiply-adds, its network {report.total_roi}")
        rows.append({"arm": arm, "run": where(run), "macs": report.total_roi, "weights": weights})
    if not networks:
        return None
    if len(sizes) > 1:
        raise ValueError(f"the networks of {name} have inputs of {sorted(sizes)}")
    (size,) = sizes
    others = OtherLoad()
    timings = [row for batch in BATCHES for row in time_batch(networks, (batch, *size), sampling, others)]
    return {
        "set": name,
        "input_size": list(size),
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "machine": describe_machine(),
        "versions": package_versions("torch", "numpy", "openvino"),
        "busy_with_others": others.mean(),
        "measure": asdict(sampling),
        "networks": rows,
        "timings": timings,
    }


def time_batch(
    networks: dict[str, nn.Module], shape: tuple[int, ...], sampling: Sampling, others: OtherLoad
) -> list[dict[str, Any]]:
    """A row for every network and engine."""
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    rows: dict[str, dict[str, Any]] = {}
    preparations: dict[str, Callable[[], Prepared]] = {}
    for arm, model in networks.items():
        for name in TARGETED if roi_layers(model) else DENSE:
            key = f"{arm}, {name}"
            rows[key] = {"arm": arm, "engine": name, "batch": shape[0]}
            preparations[key] = partial(prepare_inference, TIMED_ENGINES[name], model, images, torch.get_num_threads())
    time_rows(rows, preparations, sampling, seed=0, others=others, inference=True)
    for key, row in rows.items():
        if "failure" in row:
            print(f"{key}: {row['failure']}", flush=True)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("folder", type=Path, help="where the files go, such as benchmarks/pays")
    parser.add_argument("sets", nargs="*", default=list(SETS), help="which (all)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each network and engine")
    parser.add_argument("--seconds", type=float, default=1.0, help="that each is timed at least, over all its turns")
    given = parser.parse_args()
    sampling = Sampling(given.rounds, given.rounds, given.seconds, warmup=0.2)
    try:
        for name in given.sets:
            if name not in SETS:
                raise ValueError(unknown("set", name, SETS))
            with alone():
                content = time_set(name, given.results, sampling)
            if content is not None:
                write_whole(timings_path(given.folder, name), json.dumps(content, indent=1) + "\n")
    except (OSError, ValueError) as error:
        sys.exit(f"benchmarks/pays.py: error: {first_line(error)}")


if __name__ == "__main__":
    main()
