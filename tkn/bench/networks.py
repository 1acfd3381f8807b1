"""The networks that are timed: the baseline, its targeted version, and the baseline thinned to the same cost."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tkn.app.messages import message
from tkn.bench.config import KEYWORDS, RUN, TORCHVISION, check_config
from tkn.bench.rois import generate_rois, load_rois, read_rois
from tkn.bench.tc_resnet import TcResNet8
from tkn.convert import targetize
from tkn.layers import require_rectangles, roi_layers
from tkn.macs import MacsReport, count_macs
from tkn.models import build_model
from tkn.models.dense import densified
from tkn.models.library import torchvision_network
from tkn.models.thin import thin
from tkn.training.records.checkpoint import checkpoint_network

_log = logging.getLogger(__name__)


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
    if case.baseline == RUN:
        yield from _networks_of_run(config)
        return
    baseline = _baseline(case).eval()
    settle_norms(baseline, input_size)
    dense = count_macs(baseline, input_size)
    yield Network("baseline", "baseline", baseline, dense.total_dense, dense.parameters)

    shares = list(config.rois.share) if config.rois.source == "generated" else [None]
    for share in shares:
        torch.manual_seed(config.seed)
        targeted, origin = _targeted(config, share)
        report = count_macs(targeted, input_size)
        suffix = f" {share:g}" if len(shares) > 1 else ""
        yield from _thinned(suffix, baseline, report, config)
        macs = report.total_roi
        yield Network(
            f"targeted{suffix}", "targeted", targeted, macs, report.parameters, macs / dense.total_dense, origin
        )


def fill_case(config: DictConfig) -> DictConfig:
    """A checked configuration whose case has the name, input and outputs of the run that it names, if it names one.

    ValueError or OSError for what is no finished run.
    """
    case = config.case
    if case.baseline != RUN:
        return config
    _, identity = _trained(case)
    name = f"{identity['model']}_{identity['config']['data']['name']}" if case.name == RUN else case.name
    found = {"name": name, "input_size": list(identity["input_size"]), "num_outputs": identity["num_outputs"]}
    return check_config(OmegaConf.merge(config, {"case": found}))  # type: ignore[arg-type]


def _networks_of_run(config: DictConfig) -> Iterator[Network]:
    """Of the run, with its own weights: without ROIs; thinned; and as it is. Of a dense run the first alone."""
    input_size = tuple(config.case.input_size)
    model, _ = _trained(config.case)
    report = count_macs(model, input_size)
    baseline = densified(model)
    parameters = count_macs(baseline, input_size).parameters
    yield Network("baseline", "baseline", baseline, report.total_dense, parameters)
    if roi_layers(model):
        yield from _thinned("", baseline, report, config)
        share = report.total_roi / report.total_dense
        origin = str(_run_checkpoint(config.case))
        yield Network("targeted", "targeted", model, report.total_roi, report.parameters, share, origin)


def _trained(case: DictConfig) -> tuple[nn.Module, dict[str, Any]]:
    """The network of the run that a case names, and what its checkpoint says of itself. ValueError if its ROIs are no
    rectangles that are the same for all images."""
    model, identity = checkpoint_network(_run_checkpoint(case), "case.path=", factory=case.factory)
    require_rectangles(model, f"case.path={case.path} can't be timed beside its ROIs' multiply-adds")
    return model, identity


def _run_checkpoint(case: DictConfig) -> Path:
    """The checkpoint that the run tested."""
    path = Path(case.path).expanduser()
    if not path.is_dir():
        return path
    try:
        tested = json.loads((path / "summary.json").read_text(encoding="utf-8")).get("tested")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"case.path={path} holds no finished run: {message(error)}") from error
    return path / ("best.ckpt" if tested == "best" else "last.ckpt")


def _thinned(suffix: str, baseline: nn.Module, report: MacsReport, config: DictConfig) -> Iterator[Network]:
    """The baseline thinned to the multiply-adds of the targeted network that `report` is of, if it can be."""
    input_size = tuple(config.case.input_size)
    try:
        thinned = thin(baseline, input_size, report.total_roi, config.thinned.multiple).eval()
    except ValueError as error:  # one of torchvision's
        _log.warning("no thinned network is timed: %s", error)
        return
    settle_norms(thinned, input_size)
    counted = count_macs(thinned, input_size)
    macs = counted.total_dense
    yield Network(f"thinned{suffix}", "thinned", thinned, macs, counted.parameters, macs / report.total_dense)


def images_and_labels(config: DictConfig, batch: int) -> tuple[Tensor, Tensor]:
    """Random images [B, C, H, W] or [B, C, L] in [0, 1] and labels [B], the same for every engine."""
    generator = torch.Generator().manual_seed(config.seed)
    images = torch.rand(batch, *config.case.input_size, generator=generator)
    return images, torch.randint(config.case.num_outputs, (batch,), generator=generator)


def _targeted(config: DictConfig, share: float | None) -> tuple[nn.Module, str]:
    """The targeted network, and where its ROIs come from."""
    case, rois = config.case, config.rois
    input_size = tuple(case.input_size)
    wanted = {"model": case.targeted, "input_size": list(input_size), "num_outputs": case.num_outputs}
    if share is not None:
        if case.targeted in (TORCHVISION, KEYWORDS):
            layers = "all" if case.targets == "all" else None
            model = targetize(_baseline(case), layers, attention="cauchy", inplace=True)
        else:
            model = build_model(case.targeted, input_size, case.num_outputs)
        generate_rois(model, input_size, share, config.seed)
        settle_norms(model, input_size)
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
    settle_norms(model, input_size)
    return model.eval(), f"{path}: {content['trained']}"


def _require_case(path: Path, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    for key, value in wanted.items():
        if found[key] != value:
            raise ValueError(f"rois.path={path} is of {key}={found[key]}, the case of {key}={value}")


def _baseline(case: DictConfig) -> nn.Module:
    if case.baseline == KEYWORDS:
        return TcResNet8(case.input_size[0], case.num_outputs)
    if case.baseline != TORCHVISION:
        return build_model(case.baseline, tuple(case.input_size), case.num_outputs)
    return torchvision_network(tuple(case.input_size), case.num_outputs, network=case.network)


@torch.no_grad()
def settle_norms(model: nn.Module, input_size: tuple[int, ...]) -> None:
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
