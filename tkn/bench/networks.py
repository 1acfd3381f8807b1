"""The networks that are timed: the baseline, its targeted version, and the baseline thinned to the same cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tkn.bench.rois import generate_rois, load_rois, read_rois
from tkn.bench.thin import thin
from tkn.macs import count_macs
from tkn.models import build_model
from tkn.training.records.checkpoint import checkpoint_network


@dataclass(frozen=True)
class Network:
    """A network in evaluation mode. `kind`: baseline, thinned or targeted; `macs`: what its engines need to compute.

    share: the share of the baseline's multiply-adds, as met; rois: where the ROIs come from.
    """

    name: str
    kind: str
    model: nn.Module
    macs: int
    parameters: int
    share: float = 1.0
    rois: str | None = None


def build_networks(config: DictConfig) -> Iterator[Network]:
    """The baseline; then for each set of ROIs the targeted network, and the thinned one of as many multiply-adds.

    Deterministic. ValueError or OSError for ROIs that are not there or not of this case.
    """
    case = config.case
    input_size = tuple(case.input_size)
    torch.manual_seed(config.seed)
    baseline = build_model(case.baseline, input_size, case.num_outputs).eval()
    _settle(baseline, input_size)
    dense = count_macs(baseline, input_size)
    yield Network("baseline", "baseline", baseline, dense.total_dense, dense.parameters)

    shares = list(config.rois.share) if config.rois.source == "generated" else [None]
    for share in shares:
        torch.manual_seed(config.seed)
        targeted, origin = _targeted(config, share)
        report = count_macs(targeted, input_size)
        thinned = thin(baseline, input_size, report.total_roi, config.thinned.multiple).eval()
        _settle(thinned, input_size)
        thinned_report = count_macs(thinned, input_size)
        suffix = f" {share:g}" if len(shares) > 1 else ""
        for kind, model, macs, parameters, rois in (
            ("thinned", thinned, thinned_report.total_dense, thinned_report.parameters, None),
            ("targeted", targeted, report.total_roi, report.parameters, origin),
        ):
            yield Network(f"{kind}{suffix}", kind, model, macs, parameters, macs / dense.total_dense, rois)


def images_and_labels(config: DictConfig, batch: int) -> tuple[Tensor, Tensor]:
    """Random images [B, C, H, W] in [0, 1] and labels [B], the same for every engine."""
    generator = torch.Generator().manual_seed(config.seed)
    images = torch.rand(batch, *config.case.input_size, generator=generator)
    return images, torch.randint(config.case.num_outputs, (batch,), generator=generator)


def _targeted(config: DictConfig, share: float | None) -> tuple[nn.Module, str]:
    """The targeted network, and where its ROIs come from."""
    case, rois = config.case, config.rois
    input_size = tuple(case.input_size)
    wanted = {"model": case.targeted, "input_size": list(input_size), "num_outputs": case.num_outputs}
    if share is not None:
        model = build_model(case.targeted, input_size, case.num_outputs)
        generate_rois(model, input_size, share, config.seed)
        _settle(model, input_size)
        return model.eval(), f"generated at a share of {share:g}, seed {config.seed}"
    path = Path(rois.path).expanduser()
    if rois.source == "checkpoint":
        # Its own weights and statistics, so nothing to settle.
        model, identity = checkpoint_network(path, "rois.path=")
        _require_case(path, wanted, identity)
        return model, f"checkpoint {path}"
    content = read_rois(path)
    _require_case(path, wanted, content)
    attention = {key: content[key] for key in ("attention", "scale_unit", "min_size")}
    model = build_model(case.targeted, input_size, case.num_outputs, **attention)
    load_rois(model, path)
    _settle(model, input_size)
    return model.eval(), f"{path}: {content['trained']}"


def _require_case(path: Path, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    for key, value in wanted.items():
        if found[key] != value:
            raise ValueError(f"rois.path={path} is of {key}={found[key]}, the case of {key}={value}")


@torch.no_grad()
def _settle(model: nn.Module, input_size: tuple[int, ...]) -> None:
    """Give batch normalisations statistics of their inputs and random weights, as if trained.

    With those of the start a wrongly folded normalisation would go unseen.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.1)
        norm.momentum = 1.0  # the statistics of the next batch alone
        norm.train()
    model(torch.rand(16, *input_size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
