"""A recorded run's network, also where its checkpoint was not kept."""

from __future__ import annotations

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from tkn.layers import roi_layers
from tkn.models import Architecture
from tkn.models.factory import Factory
from tkn.report.runs.roi_states import read_states
from tkn.report.runs.run import Run
from tkn.training.networks import architecture_of


def remade_network(run: Run, factory: Factory | str | None = None) -> nn.Module:
    """The run's network with its widths and the ROIs of the epoch that it reports, but fresh weights; to evaluate.

    Of config.yaml, summary.json and rois.npz. `factory`: as for `tkn.load_model`. ValueError for a run of an earlier
    version, whose summary does not say enough, and for one whose files do not fit each other.
    """
    summary = run.result
    missing = [key for key in ("input_size", "num_outputs", "narrowed") if key not in summary]
    if missing:
        raise ValueError(f"summary.json of {run.name} has no {missing[0]}: its network can't be made again")
    config = OmegaConf.load(run.folder / "config.yaml")
    assert isinstance(config, DictConfig)
    whole = architecture_of(config, tuple(summary["input_size"]), summary["num_outputs"])
    model = Architecture.from_dict({**whole.to_dict(), "narrowed": summary["narrowed"]}).build(factory=factory)
    if roi_layers(model):
        _put_rois(model, run)
    return model.eval()


@torch.no_grad()
def _put_rois(model: nn.Module, run: Run) -> None:
    states, layers = read_states(run), roi_layers(model)
    if run.epoch not in states.epochs or states.layers.keys() != layers.keys():
        raise ValueError(f"rois.npz of {run.name} is not of its network at epoch {run.epoch}")
    at = states.epochs.index(run.epoch)
    for name, (loc, scale, _size) in states.layers.items():
        if layers[name].loc.shape != loc.shape[1:]:
            raise ValueError(f"rois.npz of {run.name} has other kernels in {name} than its network")
        layers[name].loc.copy_(loc[at])
        layers[name].scale.copy_(scale[at])
