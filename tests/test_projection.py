"""`project_` of a whole model, what layers remember for it, and that forgetting it is noticed."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import tkn
from tkn import AttentiveRegularization2d, TargetConv1d, TargetConv2d, targetize
from tkn.layers import RoiLayer, roi_layers

LEFT = r"loc or scale of a layer with ROIs has left its range: call tkn\.project_\(model\)"


def network(engine: str = "dense") -> nn.Sequential:
    """Target layers alone, joined with a ReLU and a pooling, and within another sequence."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, stride=2, padding=1)),
        nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)),
    )
    return targetize(model, engine=engine)


def images(side: int = 16) -> Tensor:
    return torch.randn(3, 1, side, side, generator=torch.Generator().manual_seed(0))


def sizes(model: nn.Module) -> list[tuple[int, ...] | None]:
    return [layer.map_size for layer in roi_layers(model).values()]


def step(layer: RoiLayer, amount: float = 0.1) -> None:
    """As an optimiser would: scale grows beyond the whole map."""
    with torch.no_grad():
        layer.scale += amount


@pytest.mark.parametrize("engine", ["dense", "roi"])
def test_the_maps_sizes_are_those_of_the_last_pass(engine: str) -> None:
    model = network(engine)
    for side in (16, 12):
        model(images(side))
        expected = [row.map_size for row in tkn.count_macs(model, (1, side, side)).target_layers]
        assert sizes(model) == expected
        model(images(side))
        assert sizes(model) == expected


@pytest.mark.parametrize("engine", ["dense", "roi"])
def test_projects_every_layer_for_its_own_map(engine: str) -> None:
    model = network(engine)
    model(images())
    expected = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for ours, theirs, size in zip(
        roi_layers(model).values(), roi_layers(expected).values(), [(16, 16), (4, 4), (2, 2)], strict=True
    ):
        assert theirs.map_size == size
        with torch.no_grad():
            for parameter, other in ((ours.loc, theirs.loc), (ours.scale, theirs.scale)):
                parameter.copy_(3 * torch.rand(parameter.shape, generator=generator) - 1)
                other.copy_(parameter)
        theirs.project_(size)
    tkn.project_(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name))


def test_before_any_pass() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"run the model once, or tkn\.count_macs\(model, input_size\)"):
        tkn.project_(model)
    tkn.project_(nn.Conv2d(1, 1, 1))  # without ROIs there is nothing to do
    model[0](images())
    step(model[0])
    step(model[3])
    tkn.project_(model)
    assert model[0].scale.max() == 1
    assert model[3].scale.max() > 1  # has not run


def test_copies_and_pickles_remember() -> None:
    model = network()
    model(images())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert sizes(other) == sizes(model)
        step(other[0])
        tkn.project_(other)
        assert other[0].scale.max() == 1
    assert "map_size" not in "".join(model.state_dict())


def test_an_image_without_batch_and_other_dimensions() -> None:
    layer, line, window = TargetConv2d(1, 2, 3), TargetConv1d(2, 2, 2), AttentiveRegularization2d(2)
    window(layer(images()[0]))
    line(torch.zeros(1, 2, 9))
    assert (layer.map_size, line.map_size, window.map_size) == ((14, 14), (8,), (14, 14))


def test_compiled_exported_and_traced_passes_are_not_remembered() -> None:
    model = network().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = copy.deepcopy(model)(images())
    torch.testing.assert_close(compiled(images()), expected)
    program = torch.export.export(model, (images(),))
    torch.testing.assert_close(program.module()(images()), expected)
    torch.fx.symbolic_trace(targetize(nn.Sequential(nn.Conv2d(1, 2, 3))))
    assert sizes(model) == [None] * 3
    model(images())
    step(model[0])
    tkn.project_(compiled)
    assert model[0].scale.max() == 1


def test_a_forgotten_projection_is_noticed_once() -> None:
    model = network()

    def train() -> None:
        for _ in range(4):
            model(images())
            step(model[0])

    with pytest.warns(UserWarning, match=LEFT):
        train()
    train()


def test_training_that_projects_is_never_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoiLayer, "_is_out_of_range", lambda *_: pytest.fail("looked"))
    model = network()
    optimizer = torch.optim.SGD(tkn.parameter_groups(model, 0.0), lr=0.1)
    for _ in range(10):
        (model(images()).square().mean() + tkn.scale_penalty(model, 1e-2)).backward()
        model(images())  # a second pass in the same step
        optimizer.step()
        tkn.project_(model)
    state = model.state_dict()
    model.load_state_dict(state)
    model(images())


def test_changes_within_the_range_and_passes_without_training_are_no_ones_mistake() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = network()
        for _ in range(9):
            model(images())
            for layer in roi_layers(model).values():
                step(layer, -0.01)
        for mode in (model.eval(), model.train()):
            step(model[0], 3.0)
            with torch.set_grad_enabled(not mode.training):
                for _ in range(9):
                    mode(images())
                    step(model[0])


@pytest.mark.parametrize("name", ["loc", "scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_out_of_range(name: str, dtype: torch.dtype) -> None:
    layer = TargetConv2d(1, 2, 3, dtype=dtype)
    layer.project_((8, 8))
    assert not layer._is_out_of_range((8, 8))
    with torch.no_grad():
        layer.get_parameter(name)[1, 0] += 1.5
    assert layer._is_out_of_range((8, 8))
    layer.project_((8, 8))
    assert not layer._is_out_of_range((8, 8))
