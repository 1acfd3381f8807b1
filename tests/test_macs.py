"""Multiply-adds: closed forms on tiny networks, ROIs by hand, nothing skipped in silence."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from tkn import AttentiveRegularization2d, TargetConv1d, TargetConv2d, TargetConv3d, count_macs, targetize
from tkn.layers import RoiLayer


class Functional(nn.Module):
    """A module that computes with its weight [4, 4] by a function of (x, weight)."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Recurrent(nn.LSTM):
    """A class of the user's own, not torch's."""


def place_roi(layer: RoiLayer, channel: int, lo: tuple[int, ...], hi: tuple[int, ...], size: tuple[int, ...]) -> None:
    """Give one kernel the ROI of pixels lo ... hi - 1."""
    with torch.no_grad():
        for axis, (first, end, length) in enumerate(zip(lo, hi, size, strict=True)):
            layer.loc[axis, channel] = (first + end) / 2 / length
            layer.scale[axis, channel] = (end - first) / (sqrt(2) * length) * 0.99


@pytest.mark.parametrize(
    ("layer", "input_size", "expected"),
    [
        (nn.Conv2d(3, 8, 3), (3, 10, 12), 8 * 3 * 9 * 8 * 10),
        (nn.Conv2d(3, 8, 3, padding=1), (3, 10, 12), 8 * 3 * 9 * 10 * 12),  # borders at full price
        (nn.Conv2d(3, 8, 3, padding="same", bias=False), (3, 10, 12), 8 * 3 * 9 * 10 * 12),  # bias free
        (nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding=1), (3, 10, 12), 8 * 3 * 15 * 5 * 10),
        (nn.Conv2d(4, 8, 3, dilation=2, groups=2), (4, 10, 12), 8 * 2 * 9 * 6 * 8),
        (nn.Conv2d(4, 4, 3, groups=4), (4, 5, 5), 4 * 1 * 9 * 3 * 3),
        (nn.Conv1d(2, 6, 5, padding=2), (2, 11), 6 * 2 * 5 * 11),
        (nn.Conv3d(2, 4, (1, 3, 3), padding=1), (2, 3, 4, 5), 4 * 2 * 9 * 5 * 4 * 5),
        (nn.Linear(7, 5), (7,), (7 + 1) * 5),
        (nn.Linear(7, 5, bias=False), (7,), (7 + 1) * 5),
        (nn.Linear(4, 5), (3, 4), 3 * (4 + 1) * 5),  # [B, T, C]
        (nn.BatchNorm2d(3), (3, 4, 5), 3 * 4 * 5),
        (nn.BatchNorm1d(6), (6,), 6),
        (nn.BatchNorm3d(2, affine=False), (2, 3, 4, 5), 120),
    ],
    ids=lambda value: repr(value) if isinstance(value, nn.Module) else "",
)
def test_closed_form(layer: nn.Module, input_size: tuple[int, ...], expected: int) -> None:
    report = count_macs(layer, input_size)
    (row,) = report.layers
    assert (row.macs_dense, row.macs_roi, row.kind, row.name) == (expected, expected, type(layer).__name__, "")
    assert row.mean_roi is None
    assert report.total_dense == report.total_roi == expected
    assert row.parameters == report.parameters == sum(p.numel() for p in layer.parameters())
    assert report.unknown == ()
    assert report.target_layers == ()


def test_network_in_order_of_execution_and_free_layers_free() -> None:
    model = nn.Sequential(
        nn.ZeroPad2d(1),
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Dropout(), nn.Identity(), nn.Sequential()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
        nn.Softmax(dim=1),
    )
    report = count_macs(model, (1, 8, 8))
    assert [(row.name, row.map_size, row.macs_dense) for row in report.layers] == [
        ("1", (8, 8), 4 * 9 * 64),
        ("2", (8, 8), 4 * 64),
        ("8", (), 5 * 2),
    ]
    assert report.total_dense == 4 * 9 * 64 + 4 * 64 + 10
    assert report.parameters == (4 * 9 + 4) + 8 + 10
    assert report.unknown == ()


def test_a_layer_that_runs_twice_counts_twice() -> None:
    conv = nn.Conv2d(2, 2, 3, padding=1)
    report = count_macs(nn.Sequential(conv, nn.ReLU(), conv), (2, 5, 5))
    assert [row.macs_dense for row in report.layers] == [2 * 2 * 9 * 25] * 2
    assert report.total_dense == 2 * 900
    assert report.parameters == 2 * 2 * 9 + 2


def test_roi_column_by_hand() -> None:
    layer = TargetConv2d(3, 4, 3, padding=1, min_size=1)
    boxes = [((0, 0), (8, 10)), ((2, 3), (5, 7)), ((7, 9), (8, 10)), ((0, 4), (8, 6))]
    for channel, (lo, hi) in enumerate(boxes):
        place_roi(layer, channel, lo, hi, (8, 10))
    assert layer.rois((8, 10)).tolist() == [[list(x) for x in zip(lo, hi, strict=True)] for lo, hi in boxes]
    (row,) = count_macs(layer, (3, 8, 10)).layers
    assert row.macs_dense == 4 * 3 * 9 * 80
    assert row.macs_roi == 3 * 9 * (80 + 12 + 1 + 16)
    assert row.mean_roi == pytest.approx(((8 + 3 + 1 + 8) / 4, (10 + 4 + 1 + 2) / 4))
    assert row.map_size == (8, 10)


@pytest.mark.parametrize(
    ("layer", "input_size", "lo", "hi", "size", "per_pixel"),
    [
        (TargetConv1d(2, 2, 5, stride=2, padding=2), (2, 12), (1,), (4,), (6,), 10),
        (TargetConv2d(4, 2, 3, groups=2), (4, 7, 8), (0, 2), (3, 6), (5, 6), 18),
        (TargetConv3d(1, 2, (1, 3, 3)), (1, 4, 5, 6), (1, 0, 1), (3, 2, 4), (4, 3, 4), 9),
    ],
    ids=["1d", "grouped", "3d"],
)
def test_roi_column_in_any_dimension(
    layer: RoiLayer,
    input_size: tuple[int, ...],
    lo: tuple[int, ...],
    hi: tuple[int, ...],
    size: tuple[int, ...],
    per_pixel: int,
) -> None:
    """One kernel on the whole map, one on a box."""
    place_roi(layer, 0, lo, hi, size)
    pixels, box = 1, 1
    for first, end, length in zip(lo, hi, size, strict=True):
        pixels, box = pixels * length, box * (end - first)
    report = count_macs(layer, input_size)
    assert report.total_dense == per_pixel * 2 * pixels
    assert report.total_roi == per_pixel * (pixels + box)
    assert report.target_layers == report.layers


def test_regularization_is_a_row_that_costs_nothing() -> None:
    report = count_macs(nn.Sequential(nn.Conv2d(1, 2, 1), AttentiveRegularization2d(2)), (1, 4, 6))
    assert [(row.kind, row.macs_dense, row.macs_roi, row.mean_roi) for row in report.layers] == [
        ("Conv2d", 2 * 24, 2 * 24, None),
        ("AttentiveRegularization2d", 0, 0, (4.0, 6.0)),
    ]


@pytest.mark.parametrize(
    ("model", "input_size", "expected"),
    [
        (nn.LSTM(4, 5, batch_first=True), (3, 4), "LSTM"),
        (Recurrent(4, 5, batch_first=True), (3, 4), "mkldnn_rnn_layer"),
        (nn.Sequential(nn.ConvTranspose2d(2, 3, 2)), (2, 4, 4), "0 (ConvTranspose2d)"),
        (nn.Sequential(nn.Identity(), nn.LayerNorm(4)), (3, 4), "1 (LayerNorm)"),
        (nn.Sequential(nn.GroupNorm(2, 4)), (4, 5), "0 (GroupNorm)"),
        (Attention(), (3, 4), "attention (_native_multi_head_attention)"),
        (nn.Sequential(Functional(torch.matmul)), (3, 4), "0 (mm)"),
        (nn.Sequential(Functional(F.linear)), (3, 4), "0 (mm)"),
        (Functional(lambda x, w: torch.einsum("btc,cd->btd", x, w)), (3, 4), "(model) (bmm)"),
        (Functional(lambda x, _w: F.scaled_dot_product_attention(x, x, x)), (3, 4), "(model) ("),
        (Functional(lambda x, w: F.conv2d(x, w[:, :1, None, None])), (1, 5, 5), "(model) (convolution)"),
        (Functional(lambda x, w: F.conv_transpose1d(x, w[:, :, None])), (4, 5), "(model) (convolution)"),
        (Functional(lambda x, _w: F.layer_norm(x, (4,))), (3, 4), "(model) (native_layer_norm)"),
        (Functional(lambda x, w: F.batch_norm(x, w[0], w[1])), (4, 4), "(model) (native_batch_norm)"),
        (Functional(lambda x, w: F.bilinear(x, x, w[None])), (3, 4), "(model) (_trilinear)"),
        (Functional(lambda x, w: torch.addbmm(w, x.mT, x)), (3, 4), "(model) (addbmm)"),
    ],
)
def test_unknown_work_is_reported(model: nn.Module, input_size: tuple[int, ...], expected: str) -> None:
    with pytest.warns(UserWarning, match="multiply-adds not counted: ") as caught:
        report = count_macs(model, input_size)
    assert any(expected in name for name in report.unknown), report.unknown
    assert any(report.unknown[0] in str(warning.message) for warning in caught)
    assert f"not counted: {report.unknown[0]}" in str(report)
    assert report.total_dense == 0
    assert report.parameters == sum(p.numel() for p in model.parameters())


def test_known_layers_beside_unknown_ones_still_count() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Functional(torch.matmul), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=r"not counted: 1 \(mm\)$"):
        report = count_macs(model, (4,))
    assert report.unknown == ("1 (mm)",)
    assert report.total_dense == 5 * 4 + 5 * 2
    assert report.parameters == 20 + 16 + 10


def test_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(), nn.Sequential(nn.BatchNorm2d(3)))
    model = targetize(model)
    model.train()
    model[3].eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    count_macs(model, (1, 6, 6))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Dropout())
    with pytest.raises(RuntimeError, match="channels"):
        count_macs(model, (2, 6, 6))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_counts_in_the_models_own_type_and_twice_the_same() -> None:
    model = targetize(nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_macs(model, (1, 6, 6)) == count_macs(model, (1, 6, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_counts_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = targetize(nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 2)))
    place_roi(model[0], 1, (1, 2), (4, 4), (6, 6))
    assert count_macs(copy.deepcopy(model).to(dtype), (1, 6, 6)) == count_macs(model, (1, 6, 6))


def dense_and_targeted() -> tuple[nn.Module, nn.Module]:
    dense = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2))
    targeted = nn.Sequential(nn.Sequential(TargetConv2d(1, 3, 3)), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2))
    return dense, targeted


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), FakeTensorMode], ids=["meta", "fake"])
def test_rois_without_values_cannot_be_counted(mode: Callable[[], Any]) -> None:
    with mode():
        dense, targeted = dense_and_targeted()
        report = count_macs(dense, (1, 6, 6))
        with pytest.raises(ValueError, match=r"layer '0\.0' depend on its loc and scale, which have no values here"):
            count_macs(targeted, (1, 6, 6))
        with pytest.raises(ValueError, match="depend on its loc and scale"):
            count_macs(AttentiveRegularization2d(3), (3, 6, 6))
    assert report == count_macs(dense_and_targeted()[0], (1, 6, 6))


def test_a_default_device_changes_no_count() -> None:
    _, targeted = dense_and_targeted()
    expected = count_macs(targeted, (1, 6, 6))
    with torch.device("meta"):
        assert count_macs(targeted, (1, 6, 6)) == expected
        assert count_macs(nn.Flatten(), (1, 6, 6)).layers == ()


class Telling(nn.Linear):
    """A layer of the user's own that returns more than a tensor."""

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return super().forward(x), 1


def test_a_layer_that_returns_more_than_a_tensor_is_reported() -> None:
    with pytest.warns(UserWarning, match=r"not counted: \(model\) \(Telling\)$"):
        report = count_macs(Telling(2, 3), (2,))
    assert report.layers == ()


def test_report_as_text() -> None:
    lines = str(count_macs(nn.Sequential(nn.Conv2d(1, 100, 3), nn.Flatten(), nn.Linear(1600, 2)), (1, 6, 6))).split(
        "\n"
    )
    assert lines[0].split() == ["layer", "type", "map", "parameters", "MACs", "dense", "MACs", "ROI"]
    assert lines[1].split() == ["0", "Conv2d", "4x4", "1,000", "14,400", "14,400"]
    assert lines[-1].split() == ["total", "4,202", "17,602", "17,602"]
    assert len({len(line) for line in lines}) == 1
