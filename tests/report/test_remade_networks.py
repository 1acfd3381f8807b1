"""Networks of recorded runs without their checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_runs import config_text, summary_of

from tkn.cli import compose
from tkn.layers import roi_layers
from tkn.macs import count_macs
from tkn.models import Architecture
from tkn.models.narrow import thin_network
from tkn.report.runs.networks import remade_network
from tkn.report.runs.run import Run, read_run
from tkn.training.networks import architecture_of

SIZE = (1, 28, 28)


def _run(folder: Path, architecture: Architecture, *arguments: str, **changes: Any) -> Run:
    network = architecture.to_dict()
    summary = {
        **summary_of("tdn10" if architecture.targeted else "dn10"),
        **{key: network[key] for key in ("input_size", "num_outputs", "narrowed")},
    }
    folder.mkdir()
    (folder / "config.yaml").write_text(config_text(*arguments, "data=mnist"))
    (folder / "summary.json").write_text(json.dumps({**summary, **changes}))
    run = read_run(folder)
    assert run is not None
    return run


def _architecture(*arguments: str) -> Architecture:
    return architecture_of(compose(*arguments, "data=mnist"), SIZE, 10)


def test_a_narrower_network(tmp_path: Path) -> None:
    arguments = ("model=dn10", "model.thin=0.3333")
    model, architecture = thin_network(_architecture(*arguments), 0.3333)
    remade = remade_network(_run(tmp_path / "run", architecture, *arguments))
    assert not remade.training
    assert {name: value.shape for name, value in remade.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    assert architecture.narrowed is not None
    assert count_macs(remade, SIZE).total_dense == architecture.narrowed.macs < 0.34 * 11_317_030


def test_rois_of_the_epoch_that_is_reported(tmp_path: Path) -> None:
    architecture = _architecture("model=tdn10")
    layers = roi_layers(architecture.build())
    run = _run(tmp_path / "run", architecture, "model=tdn10", epochs=2)
    with pytest.raises(ValueError, match=r"has neither rois\.npz nor last\.ckpt"):
        remade_network(run)
    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {"epochs": np.arange(3)}
    for name, layer in layers.items():
        arrays[f"{name}.size"] = np.array([28, 28])
        for key in ("loc", "scale"):
            arrays[f"{name}.{key}"] = random.uniform(0.3, 0.7, (3, *layer.loc.shape)).astype(np.float32)
    np.savez(run.folder / "rois.npz", **arrays)  # type: ignore[arg-type]
    for name, layer in roi_layers(remade_network(run)).items():
        assert torch.equal(layer.loc, torch.from_numpy(arrays[f"{name}.loc"][2]))
        assert torch.equal(layer.scale, torch.from_numpy(arrays[f"{name}.scale"][2]))
    for change, message in (
        ({"epochs": np.arange(2, 5) + 1}, r"rois\.npz of \S+ is not of its network at epoch 2"),
        ({f"{name}.{key}": np.ones((3, 2, 5)) for key in ("loc", "scale")}, f"other kernels in {name} than"),
    ):
        np.savez(run.folder / "rois.npz", **{**arrays, **change})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            remade_network(run)


def test_a_network_of_ones_own_code(tmp_path: Path) -> None:
    factory = "tkn.models.small_cnn:small_cnn"
    arguments = ("model=python", f"model.factory={factory}")
    run = _run(tmp_path / "run", _architecture(*arguments), *arguments)
    with pytest.raises(ValueError, match="code that is not in the file"):
        remade_network(run)
    assert count_macs(remade_network(run, factory), SIZE).total_dense > 0


def test_a_run_of_an_earlier_version(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", _architecture("model=dn10"), "model=dn10")
    summary = json.loads((run.folder / "summary.json").read_text())
    del summary["input_size"]
    (run.folder / "summary.json").write_text(json.dumps(summary))
    earlier = read_run(run.folder)
    assert earlier is not None
    with pytest.raises(ValueError, match="has no input_size: its network can't be made again"):
        remade_network(earlier)
