"""Where a regression begins: at the mean of what it is to tell, and spread as that is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from own_images import face_rows, write_faces
from torch import Tensor, nn

import tkn
from tkn.cli import compose
from tkn.models import build_model
from tkn.training.outputs import start_at_

#: Mean 33, deviation 5.
TARGETS = torch.tensor([[28.0], [38.0]])


def outputs(model: nn.Module, size: tuple[int, int, int]) -> Tensor:
    result: Tensor = model.eval()(torch.zeros(1, *size))
    return result


def pooled(*last: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), *last)


@pytest.mark.parametrize(
    "model",
    [
        lambda: build_model("tdn10", (1, 16, 16), 1),
        lambda: pooled(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)),
        lambda: pooled(nn.Conv2d(4, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ],
)
def test_the_outputs_begin_where_the_targets_are(model: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    made = model().train()
    *_, bias = (parameter for name, parameter in made.named_parameters() if name.endswith("bias"))
    with torch.no_grad():
        before = outputs(made, (1, 16, 16)) - bias
        made.train()
        start_at_(made, (1, 16, 16), TARGETS)
        assert bias.item() == 33.0
        assert made.training
        torch.testing.assert_close(outputs(made, (1, 16, 16)), 5 * before + 33.0)


@pytest.mark.parametrize(
    "last",
    [
        [nn.Flatten(), nn.Linear(4 * 14 * 14, 1), nn.Softplus()],
        [nn.Flatten(), nn.Linear(4 * 14 * 14, 1, bias=False)],
        [nn.Flatten(), nn.Linear(4 * 14 * 14, 2)],
        [nn.Conv2d(4, 1, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
        [nn.Conv2d(4, 1, 1), nn.BatchNorm2d(1), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
    ],
)
def test_other_networks_are_left_alone(last: list[nn.Module]) -> None:
    torch.manual_seed(0)
    model = pooled(*last)
    outputs(model, (1, 16, 16))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start_at_(model, (1, 16, 16), TARGETS)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_equal_targets_leave_the_weights() -> None:
    model = build_model("dn10", (1, 16, 16), 1)
    *_, weight, bias = model.parameters()
    before = weight.clone()
    start_at_(model, (1, 16, 16), torch.full((3, 1), 7.0))
    assert torch.equal(weight, before)
    assert bias.item() == 7.0


def test_a_run_begins_there_unless_it_begins_with_a_learned_bias(tmp_path: Path) -> None:
    faces = write_faces(tmp_path / "people", face_rows(16))
    arguments = ["model=dn10", "data=faces", f"data.path={faces}", "data.target=age", "data.task=regression"]
    arguments += ["data.size=16", "data.limit=10", "recipe.batch_size=8", "recipe.optimizer.lr=0"]
    arguments += ["trainer.max_epochs=1", "trainer.accelerator=cpu"]
    _, made = tkn.run(compose(*arguments), tmp_path / "run")
    *_, bias = made["module"].model.parameters()
    torch.testing.assert_close(bias.detach().cpu(), made["data"].train.targets[:10].mean(dim=0))

    weights = f"model.weights={tmp_path / 'run' / 'last.ckpt'}"
    _, again = tkn.run(compose(*arguments, weights, "data.limit=5", "recipe.batch_size=4"), tmp_path / "again")
    *_, kept = again["module"].model.parameters()
    assert torch.equal(kept, bias)
