"""`tkn.slide`: every window as if it were cut out and given to the network alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tkn
from tkn.crops import convolved_rows, in_batches, shares
from tkn.layers import roi_layers
from tkn.sliding import WindowScores


def network(name: str, side: int = 12, seed: int = 0) -> nn.Module:
    """A network whose ROIs are small and elsewhere for each kernel, with normalisations that do something."""
    torch.manual_seed(seed)
    model = tkn.build_model(name, (1, side, side), 3, engine="dense").double().eval()
    for layer in roi_layers(model).values():
        nn.init.uniform_(layer.loc, 0.2, 0.8)
        nn.init.uniform_(layer.scale, 0.2, 0.6)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def one_by_one(model: nn.Module, image: Tensor, window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """The network on each crop alone: [outputs, rows, columns]."""
    (height, width), (down, right) = window, stride
    tops, lefts = range(0, image.shape[1] - height + 1, down), range(0, image.shape[2] - width + 1, right)
    with torch.no_grad():
        rows = [[model(image[None, :, y : y + height, x : x + width])[0] for x in lefts] for y in tops]
    return torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1)


@pytest.mark.parametrize(("name", "shared"), [("tdn10", True), ("dn10", True), ("tkn6", False)])
@pytest.mark.parametrize("batch", [1, 7, 128])
def test_as_the_network_of_each_crop(name: str, shared: bool, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = network(name), torch.rand(1, 22, 27, dtype=torch.float64)
    bands: list[object] = []
    monkeypatch.setattr("tkn.sliding.convolved_rows", lambda *a: bands.append(a) or convolved_rows(*a))
    model.train()
    found = tkn.slide(model, image, (5, 3), window=12, batch_size=batch)
    assert all(module.training for module in model.modules())
    assert bool(bands) is shared
    want = one_by_one(model.eval(), image, (12, 12), (5, 3))
    assert found.scores.shape == want.shape == (3, 3, 6)
    torch.testing.assert_close(found.scores, want, rtol=1e-10, atol=1e-12)
    assert want.flatten(1).std(1).min() > 1e-3  # windows differ


@pytest.mark.parametrize(
    ("kernel", "padding", "groups", "bias"),
    [((3, 3), (1, 1), 1, False), ((5, 3), (2, 0), 2, True), ((4, 4), (3, 2), 1, True), ((1, 1), (0, 0), 1, False)],
)
@pytest.mark.parametrize("stride", [(1, 1), (3, 2), (7, 9)])
def test_a_shared_convolution_at_every_border(
    kernel: tuple[int, int], padding: tuple[int, int], groups: int, bias: bool, stride: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, kernel, padding=padding, groups=groups, bias=bias).double()
    window, image = (7, 9), torch.randn(2, 21, 27, dtype=torch.float64)
    assert shares(conv, window)
    with torch.no_grad():
        rows = list(convolved_rows(conv, image, window, stride))
        for number, row in enumerate(rows):
            y = number * stride[0]
            crops = [image[:, y : y + 7, x : x + 9] for x in range(0, 27 - 9 + 1, stride[1])]
            torch.testing.assert_close(row, conv(torch.stack(crops)), rtol=1e-12, atol=1e-12)
    assert len(rows) == (21 - 7) // stride[0] + 1


def test_what_is_not_shared() -> None:
    for layer in (
        nn.Conv2d(1, 2, 3, stride=2),
        nn.Conv2d(1, 2, 3, dilation=2),
        nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(1, 2, 9),
        nn.Conv2d(1, 2, 3, padding=3),
        tkn.TargetConv2d(1, 2, 3),
        nn.ReLU(),
    ):
        assert not shares(layer, (8, 8))
    # Somebody wants to see the convolution's input.
    model, seen = network("dn10"), []
    model[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape))
    tkn.slide(model, torch.rand(1, 12, 16, dtype=torch.float64), 2, window=12)
    assert seen == [(3, 1, 12, 12)]


def test_batches_keep_the_order() -> None:
    rows = [torch.arange(5 * n, 5 * n + 5)[:, None] for n in range(4)]
    for size in (1, 3, 5, 20, 50):
        batches = list(in_batches(rows, size))
        assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
        assert torch.cat(batches)[:, 0].tolist() == list(range(20))


def scores(sure: dict[tuple[int, int], tuple[int, float]], rows: int = 4, columns: int = 5) -> WindowScores:
    """Of 3 outputs, windows of 8x6 pixels every 2: output 2 everywhere, but at `sure`: (output, logit)."""
    values = torch.zeros(3, rows, columns)
    values[2] = 4.0
    for (row, column), (output, value) in sure.items():
        values[:, row, column] = 0
        values[output, row, column] = value
    return WindowScores(values, (8, 6), (2, 2))


def test_boxes_heat_map_and_detections() -> None:
    found = scores({(0, 0): (0, 5.0), (0, 1): (1, 6.0), (3, 4): (1, 3.0)})
    assert found.boxes.shape == (4, 5, 4)
    assert found.boxes[3, 1].tolist() == [2, 6, 8, 14]
    all_of_it = found.detections(0.5, background=2)
    assert all_of_it.labels.tolist() == [1, 1]  # the window at (0, 0) overlaps with a surer one
    assert all_of_it.boxes.tolist() == [[2, 0, 8, 8], [8, 6, 14, 14]]
    assert all_of_it.probabilities.tolist() == found.probabilities[1, [0, 3], [1, 4]].tolist()
    assert found.detections(0.5, overlap=0.9, background=2).labels.tolist() == [1, 0, 1]
    assert found.detections(0.95, background=2).labels.tolist() == [1]
    assert len(found.detections(0.999, background=2).labels) == 0
    assert found.detections(0.5).labels.tolist().count(2) > 0

    heat = found.heat_map()
    assert heat.shape == (3, 14, 14)
    slow = torch.zeros_like(heat)
    for y, x in product(range(14), range(14)):
        holds = [
            (row, column)
            for row, column in product(range(4), range(5))
            if 2 * row <= y < 2 * row + 8 and 2 * column <= x < 2 * column + 6
        ]
        slow[:, y, x] = torch.stack([found.probabilities[:, row, column] for row, column in holds]).mean(0)
    torch.testing.assert_close(heat, slow)
    single = WindowScores(torch.tensor([[[0.0, 3.0]]]), (2, 2), (1, 1))
    torch.testing.assert_close(single.probabilities, torch.tensor([[[0.5, 0.9525741]]]))


def test_a_forward_of_its_own_takes_whole_windows() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.forward = lambda x: x.sum((2, 3))  # type: ignore[method-assign]
    image = torch.rand(1, 12, 20)
    found = tkn.slide(model, image, np.int64(4), window=8, batch_size=np.int64(2))
    assert found.stride == (4, 4)
    torch.testing.assert_close(found.scores, one_by_one(model, image, (8, 8), (4, 4)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: tkn.slide(m, x, 2), "window=.h, w. must be given"),
        (lambda m, x: tkn.slide(m, x, 2, window=(12, 30)), "width of 30 is larger than the image's, 20"),
        (
            lambda m, x: tkn.slide(m, x, 3, window=12),
            "leaves 2 pixels .* width of 20 .*crop it to 18.*to 21",
        ),
        (lambda m, x: tkn.slide(m, x, (2, 14), window=(12, 4)), "stride=14 is larger"),
        (lambda m, x: tkn.slide(m, x, 0, window=12), "stride=0 must be"),
        (lambda m, x: tkn.slide(m, x, 2.0, window=12), "stride=2.0 must be a whole number"),
        (lambda m, x: tkn.slide(m, x, None, window=12), "stride=None must be a whole number"),
        (lambda m, x: tkn.slide(m, x, 2, window=(12, 12, 1)), "window=.* must be"),
        (
            lambda m, x: tkn.slide(m, x.double(), 2, window=12),
            "image is torch.float64 on cpu, and the network torch",
        ),
        (lambda m, x: tkn.slide(m, x[None], 2, window=12), "must be a floating-point tensor .C, H, W."),
        (lambda m, x: tkn.slide(m, x.int(), 2, window=12), "not torch.int32"),
        (lambda m, x: tkn.slide(m[:-1], x, 2, window=12).scores, "must give .B, outputs."),
        (lambda *_: scores({}).detections(1.5), "threshold=1.5"),
        (lambda *_: scores({}).detections(0.5, overlap=-1), "overlap=-1"),
        (lambda *_: scores({}).detections(0.5, background=3), "background=3"),
        (lambda *_: scores({}).detections(0.5, background=1.5), "background=1.5"),
    ],
)
def test_bad_input(call: Callable[[nn.Module, Tensor], object], message: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=message):
        call(model, torch.rand(1, 12, 20))
