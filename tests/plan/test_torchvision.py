"""torchvision's networks as graphs: the engine knows all of their operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_cases import targeted
from plan_networks import agree
from torchvision.models import convnext, get_model, shufflenetv2

from tkn import targetize
from tkn.plan.capture import build_graph, frozen

#: One of each family: the others have more layers of the same kinds.
NAMES = (
    *("mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "efficientnet_b0", "regnet_y_400mf"),
    *("resnet18", "densenet121", "squeezenet1_1", "shufflenet_v2_x0_5", "googlenet"),
)
OPTIONS: dict[str, dict[str, Any]] = {"googlenet": {"init_weights": False, "transform_input": True}}


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_knows_all_operations(name: str) -> None:
    model = get_model(name, weights=None, num_classes=4, **OPTIONS.get(name, {}))
    graph = build_graph(frozen(model), (3, 64, 64))
    assert [f"{node.name} ({node.kind})" for node in graph.nodes if node.by_torch] == []


def test_a_small_convnext() -> None:
    torch.manual_seed(0)
    stages = [convnext.CNBlockConfig(12, 20, 1), convnext.CNBlockConfig(20, None, 1)]
    model = convnext.ConvNeXt(stages, num_classes=4, layer_scale=0.5)
    with torch.no_grad():
        agree(targeted(targetize(model), seed=1).eval(), (3, 24, 32), (1, 3))


def test_a_small_shufflenet() -> None:
    torch.manual_seed(0)
    model = shufflenetv2.ShuffleNetV2([1, 2, 1], [8, 12, 20, 24, 32], num_classes=4)
    with torch.no_grad():
        agree(targeted(targetize(model), seed=1).eval(), (3, 32, 48), (1, 3))
