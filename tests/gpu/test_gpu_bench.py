"""What tkn-bench times on a GPU: results and gradients held against torch's, calls captured and timed by events."""

from __future__ import annotations

import pytest
import torch
from engine_cases import targeted
from torch import nn

from tkn import TargetConv2d
from tkn.bench.engines import TIMED_ENGINES, prepare_inference, prepare_training
from tkn.bench.on_gpu import gpu_seconds, graphed
from tkn.plan.place import Place


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_engine_is_timed(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    layers = (TargetConv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(75, 3))
    network = targeted(nn.Sequential(*layers), seed=1).eval()
    images, labels = torch.rand(3, 2, 5, 5), torch.arange(3)
    place = Place(device, dtype)
    precision = "float32" if dtype == torch.float32 else "reduced"
    calls = []
    with torch.inference_mode():
        inference = prepare_inference(TIMED_ENGINES["tkn"], network, images, 1, place)
        calls.append(graphed(inference.call) if device.type == "cuda" else inference.call)
    training = prepare_training(TIMED_ENGINES["tkn"], network, images, labels, place)
    calls.append(graphed(training.call) if device.type == "cuda" else training.call)
    for prepared in (inference, training):
        assert prepared.precision == precision
        assert 0 < prepared.difference < (1e-5 if dtype == torch.float32 else 1e-2)
    for call in calls:
        call()
        if device.type == "cuda":
            assert gpu_seconds(call) > 0
