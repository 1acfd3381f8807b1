"""Engines compute what torch computes or are refused; missing ones say so."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

import tkn
from tkn.bench import engines
from tkn.bench.cli import compose
from tkn.bench.config import check_config
from tkn.bench.engines import (
    TIMED_ENGINES,
    Inference,
    TimedEngine,
    TrainingOptions,
    prepare_inference,
    prepare_training,
)
from tkn.bench.networks import Network, build_networks, images_and_labels
from tkn.layers import TargetConv2d, roi_layers
from tkn.macs import count_macs
from tkn.plan.place import Place


@pytest.fixture(scope="module")
def config() -> DictConfig:
    return check_config(compose("case.input_size=[1,12,12]", "rois.share=0.7"))


@pytest.fixture(scope="module")
def networks(config: DictConfig) -> dict[str, Network]:
    return {network.name: network for network in build_networks(config)}


def test_networks_cost_the_same(networks: dict[str, Network]) -> None:
    assert list(networks) == ["baseline", "thinned", "targeted"]
    baseline, thinned, targeted = networks.values()
    assert targeted.share == pytest.approx(0.7, rel=0.03)
    assert thinned.macs == pytest.approx(targeted.macs, rel=0.04)
    assert targeted.macs == count_macs(targeted.model, (1, 12, 12)).total_roi
    assert not any(network.model.training for network in networks.values())
    # As if trained: an engine that folds normalisations wrongly must be found out.
    norms = [module for module in baseline.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.running_mean is not None and norm.running_mean.abs().max() > 0 for norm in norms)


def test_several_shares_make_several_networks() -> None:
    config = check_config(compose("case.input_size=[1,12,12]", "rois.share=[0.7,1]"))
    names = [network.name for network in build_networks(config)]
    assert names == ["baseline", "thinned 0.7", "targeted 0.7", "thinned 1", "targeted 1"]


@pytest.mark.parametrize("name", ["torch", "torch-channels-last", "torch-masked", "torch-masked-channels-last"])
def test_torch(config: DictConfig, networks: dict[str, Network], name: str) -> None:
    images, labels = images_and_labels(config, 3)
    network = networks["targeted" if TIMED_ENGINES[name].targeted else "thinned"].model
    before = {key: value.clone() for key, value in network.state_dict().items()}
    inference = prepare_inference(TIMED_ENGINES[name], network, images, threads=1)
    assert inference.difference < 1e-5
    with torch.inference_mode():
        torch.testing.assert_close(inference.call(), network(images), rtol=1e-4, atol=1e-4)
    training = prepare_training(TIMED_ENGINES[name], network, images, labels)
    assert training.difference < 1e-4
    training.call()
    training.call()
    # What is timed is a copy.
    assert not network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_fourier_computes_large_convolutions(config: DictConfig, networks: dict[str, Network]) -> None:
    images, labels = images_and_labels(config, 64)
    network = tkn.build_model("cnn6", (1, 12, 12), 10).eval()
    assert TIMED_ENGINES["fourier"].applies_to(network)
    assert not TIMED_ENGINES["fourier"].applies_to(networks["baseline"].model)
    inference = prepare_inference(TIMED_ENGINES["fourier"], network, images, threads=1)
    assert 0 < inference.difference < 1e-5
    training = prepare_training(TIMED_ENGINES["fourier"], network, images, labels)
    assert 0 < training.difference < 1e-4
    training.call()


def _wrong(network: nn.Module, images: Tensor, _threads: int) -> Inference:
    return Inference(lambda: network(images) * 1.01)


def test_wrong_outputs_are_refused(config: DictConfig, networks: dict[str, Network]) -> None:
    images, _ = images_and_labels(config, 2)
    with pytest.raises(ValueError, match=r"its outputs differ from torch's by 0\.01 of their size, more than 0\.001"):
        prepare_inference(TimedEngine(infer=_wrong), networks["baseline"].model, images, 1)
    reduced = TimedEngine(infer=lambda *args: Inference(_wrong(*args).call, precision="reduced"))
    assert prepare_inference(reduced, networks["baseline"].model, images, 1).precision == "reduced"
    nothing = TimedEngine(infer=lambda *_: Inference(lambda: torch.full((2, 10), torch.nan)))
    with pytest.raises(ValueError, match="differ from torch's by nan"):
        prepare_inference(nothing, networks["baseline"].model, images, 1)
    other = TimedEngine(infer=lambda *_: Inference(lambda: torch.zeros(2, 9)))
    with pytest.raises(ValueError, match=r"outputs have shape \(2, 9\)"):
        prepare_inference(other, networks["baseline"].model, images, 1)


def test_wrong_gradients_are_refused(
    config: DictConfig, networks: dict[str, Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = images_and_labels(config, 4)
    made = engines._training_network

    def scaled(network: nn.Module, options: TrainingOptions, place: Place) -> Any:
        model, forward = made(network, options, place)
        return model, (lambda x: forward(x) * 1.1) if options.channels_last else forward

    monkeypatch.setattr(engines, "_training_network", scaled)
    with pytest.raises(ValueError, match="its gradients differ"):
        prepare_training(
            TimedEngine(train=TrainingOptions(channels_last=True)), networks["baseline"].model, images, labels
        )


def test_a_training_step_of_a_targeted_network_projects(
    config: DictConfig, networks: dict[str, Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = images_and_labels(config, 2)
    projected: list[tuple[int, ...]] = []
    monkeypatch.setattr(TargetConv2d, "project_", lambda _self, size: projected.append(size))
    prepared = prepare_training(TIMED_ENGINES["torch-masked"], networks["targeted"].model, images, labels)
    assert not projected
    prepared.call()
    assert projected == [(12, 12)] * 2 + [(6, 6)] * 2 + [(3, 3)] * 2


@pytest.mark.parametrize(
    ("name", "missing"), [("onnxruntime", "onnxruntime"), ("openvino", "openvino"), ("openvino-reduced", "openvino")]
)
def test_missing_peers(
    config: DictConfig, networks: dict[str, Network], monkeypatch: pytest.MonkeyPatch, name: str, missing: str
) -> None:
    images, _ = images_and_labels(config, 1)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError) as error:
        prepare_inference(TIMED_ENGINES[name], networks["baseline"].model, images, 1)
    assert error.value.name == missing


def test_this_engine_is_asked_for_a_plan(
    config: DictConfig, networks: dict[str, Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _ = images_and_labels(config, 2)
    asked: list[Any] = []

    class Plan(SimpleNamespace):
        fallbacks = ("fc",)
        timings = {"torch, channels last": 1.0, "vectors over 16 images": 2.0}  # noqa: RUF012

        def __call__(self, x: Tensor) -> Tensor:
            return self.model(x)  # type: ignore[no-any-return]

    def accelerate(model: nn.Module, batch_size: int, input_size: tuple[int, ...], **_: Any) -> Plan:
        assert len(roi_layers(model)) == 6
        asked.append((batch_size, input_size))
        return Plan(model=model)

    monkeypatch.setattr(engines, "accelerate", accelerate)
    monkeypatch.setattr(engines, "_require_roi_engine", lambda *_: None)
    prepared = prepare_inference(TIMED_ENGINES["tkn"], networks["targeted"].model, images, 1)
    assert asked == [(2, (1, 12, 12))]
    chosen = "the plan computes all by torch, channels last, which was faster as it was made"
    assert prepared.notes == ("by torch: fc", chosen)
    assert prepared.precision == "float32"
    reduced = prepare_inference(TIMED_ENGINES["tkn-reduced"], networks["targeted"].model, images, 1)
    assert (reduced.precision, reduced.notes) == ("reduced", ("by torch: fc", chosen, "bfloat16"))


def test_openvino_says_in_which_precision_it_computes() -> None:
    precisions = {name: engines._precision(dtype) for name, dtype in engines._OPENVINO_TYPES.items()}
    assert precisions == {"f32": "float32", "bf16": "reduced", "f16": "reduced"}
