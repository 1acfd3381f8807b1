"""The receptive field of a ROI, held against perturbed pixels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import DenseNet, ResNet
from torchvision.models.resnet import BasicBlock

from tkn import AdaptiveConv2d, MixtureConv2d, TargetConv2d, build_model, targetize
from tkn.layers import RoiLayer, roi_layers
from tkn.report.kernels.hooks import hooked_outputs
from tkn.report.kernels.receptive_field import box_around, receptive_fields
from tkn.roi import roi_mask
from tkn.sequential import TargetSequential

SIZE = (2, 24, 20)


def _chain() -> nn.Module:
    """Even and odd kernels, strides, dilation, poolings that overlap, padding that wraps around."""
    return TargetSequential(
        TargetConv2d(2, 4, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        TargetConv2d(4, 4, 2, stride=(2, 1), padding=1),
        nn.ReLU(),
        nn.AvgPool2d(3, stride=1, padding=1),
        TargetConv2d(4, 4, 3, dilation=2, padding=2, padding_mode="circular"),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def _resnet() -> nn.Module:
    resnet = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)
    resnet.conv1 = nn.Conv2d(2, 64, 7, 2, 3, bias=False)
    return targetize(resnet)


def _densenet() -> nn.Module:
    densenet = DenseNet(4, (2, 2), num_init_features=4, num_classes=3)
    densenet.features.conv0 = nn.Conv2d(2, 4, 7, 2, 3, bias=False)
    return targetize(densenet)


def _random_rois(model: nn.Module, share: float) -> None:
    for layer in roi_layers(model).values():
        with torch.no_grad():
            layer.loc.uniform_(0, 1)
            layer.scale.uniform_(0.05, share)
            layer.project_(layer.map_size)
            layer.engine = "dense"  # compiles nothing


def _responses(layer: RoiLayer, model: nn.Module, images: Tensor, kernel: int) -> Tensor:
    """[B, n]: those inside the kernel's ROI."""
    kept: list[Tensor] = []

    def keep(output: Tensor) -> Tensor:
        inside = roi_mask(tuple(output.shape[2:]), layer.rois(tuple(output.shape[2:])))
        kept.append(output[:, kernel, inside[kernel]])
        return output

    with hooked_outputs(layer, keep), torch.no_grad():
        model(images)
    return kept[0]


def _roi_fields(model: nn.Module, size: tuple[int, int, int], layers: dict[str, RoiLayer]) -> dict[str, Tensor]:
    """Of every kernel's ROI, [C, 2, 2]."""
    boxes = {}
    for name, fields in receptive_fields(model, size, layers).items():
        rois = layers[name].rois(tuple(fields.shape[1:3])).tolist()
        boxes[name] = torch.stack(
            [
                box_around(of[top:bottom, left:right])
                for of, ((top, bottom), (left, right)) in zip(fields, rois, strict=True)
            ]
        )
    return boxes


@pytest.mark.parametrize("network", [_chain, _resnet, _densenet, lambda: build_model("tdn10", SIZE, 3)])
def test_what_lies_outside_changes_nothing_and_every_edge_does(network: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = network().eval()
    model(torch.rand(1, *SIZE))
    _random_rois(model, 0.3)
    layers = roi_layers(model)
    fields = _roi_fields(model, SIZE, layers)
    # Positive numbers, so that no ReLU hides what changes.
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("loc", "scale")):
                parameter.abs_()
    image = torch.rand(SIZE, dtype=torch.float64)
    smaller = 0
    for name, layer in list(layers.items())[:: max(1, len(layers) // 5)]:
        for kernel in (0, layer.num_kernels - 1):
            (top, bottom), (left, right) = fields[name][kernel].tolist()
            smaller += bottom - top < SIZE[1]
            outside, expected = (
                100 * torch.rand(SIZE, dtype=torch.float64),
                _responses(layer, model, image[None], kernel),
            )
            outside[:, top:bottom, left:right] = image[:, top:bottom, left:right]
            torch.testing.assert_close(_responses(layer, model, outside[None], kernel), expected, rtol=1e-12, atol=0)
            for rows, columns in (
                *(((top, top + 1), (0, SIZE[2])), ((bottom - 1, bottom), (0, SIZE[2]))),
                *(((0, SIZE[1]), (left, left + 1)), ((0, SIZE[1]), (right - 1, right))),
            ):
                edge = image.clone()
                edge[:, slice(*rows), slice(*columns)] += 100
                assert not torch.allclose(_responses(layer, model, edge[None], kernel), expected), (name, kernel, rows)
    assert smaller > 0


def test_one_layer_in_closed_form() -> None:
    layer = TargetConv2d(1, 2, 3, stride=2, padding=1)
    with torch.no_grad():
        layer.loc.copy_(torch.tensor([[0.25, 0.5], [0.5, 0.9]]))
        layer.scale.copy_(torch.tensor([[0.2, 1.0], [0.1, 0.3]]))
    rois = layer.rois((10, 8)).tolist()
    (fields,) = receptive_fields(layer, (1, 20, 16), {"": layer}).values()
    assert fields.shape == (2, 10, 8, 2, 2)
    assert fields[1, 3, 0].tolist() == [[5, 8], [0, 2]]
    (field,) = _roi_fields(layer, (1, 20, 16), {"": layer}).values()
    assert field.tolist() == [
        [[max(0, 2 * lo - 1), min(length, 2 * hi)] for (lo, hi), length in zip(roi, (20, 16), strict=True)]
        for roi in rois
    ]


def test_what_earlier_rois_clip_is_not_seen() -> None:
    first, second = TargetConv2d(1, 1, 3, padding=1), TargetConv2d(1, 2, 3, padding=1)
    with torch.no_grad():
        first.loc.fill_(0.25)
        first.scale.fill_(0.2)
        second.loc.copy_(torch.tensor([[0.3, 0.8]] * 2))
        second.scale.fill_(0.2)
    model = nn.Sequential(first, second)
    layers = roi_layers(model)
    ((lo, hi),) = set(map(tuple, first.rois((20, 20))[0].tolist()))
    assert (lo, hi) == (2, 8)
    fields = _roi_fields(model, (1, 20, 20), layers)
    assert fields["0"].tolist() == [[[1, 9], [1, 9]]]
    # The second layer's first ROI is of pixels 3 to 8; its other one sees nothing of the first layer's.
    assert fields["1"].tolist() == [[[1, 9], [1, 9]], [[0, 0], [0, 0]]]
    first.clip = False
    assert _roi_fields(model, (1, 20, 20), layers)["1"][1].tolist() == [[11, 20], [11, 20]]


def test_a_mean_of_the_whole_image_is_the_whole_image() -> None:
    model = build_model("tstn", (3, 32, 32), 5).eval()
    model(torch.rand(1, 3, 32, 32))
    _random_rois(model, 0.2)
    fields = receptive_fields(model, (3, 32, 32), roi_layers(model))
    assert all((field == torch.tensor([0, 32])).all() for field in fields.values())


def test_rois_that_follow_the_image_are_taken_as_whole_maps() -> None:
    first, second = AdaptiveConv2d(1, 2, 3, padding=1), MixtureConv2d(2, 1, 3, padding=1)
    with torch.no_grad():
        first.scale.fill_(0.2)
        first.locator.saliency.weight.normal_()
        second.scale.fill_(0.1)
        second.loc.copy_(torch.tensor([[0.1, 0.9]] * 2))
    fields = receptive_fields(nn.Sequential(first, second), (1, 20, 20), {"0": first, "1": second})
    assert fields["0"][1, 0, 7].tolist() == [[0, 2], [6, 9]]
    assert fields["1"][0, 2, 2].tolist() == [[0, 5], [0, 5]]
    assert first.clip


def test_the_model_stays_as_it_was() -> None:
    layer = TargetConv2d(1, 2, 3, padding=1, engine="roi").train()
    model = nn.Sequential(layer)
    receptive_fields(model, (1, 8, 8), {"0": layer})
    assert layer.training
    assert (layer.engine, layer.weight.dtype, len(layer._forward_hooks)) == ("roi", torch.float32, 0)


def test_impossible_networks_are_named() -> None:
    layer = TargetConv2d(1, 1, 3, padding=1)
    with pytest.raises(ValueError, match=r"layer 0 is run several times for an image"):
        receptive_fields(nn.Sequential(layer, nn.ReLU(), layer), (1, 8, 8), {"0": layer})
    with torch.no_grad():
        layer.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="layer 0 gives NaN: the network has diverged"):
        receptive_fields(nn.Sequential(layer), (1, 8, 8), {"0": layer})
