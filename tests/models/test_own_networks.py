"""Networks of torchvision, timm and one's own code, and what is made of them."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18

from tkn import build_model, count_macs
from tkn.layers import roi_layers
from tkn.models import Architecture
from tkn.models.build import default_weights
from tkn.models.freezing import freeze_, frozen_norms
from tkn.models.narrow import thin_network
from tkn.models.weights import fit_weights, read_weights

SIZE = (3, 32, 32)
FLAT = {"attention": "cauchy", "scale_unit": 0.5, "min_size": 3}


class TinyNet(nn.Module):
    """Two convolutions, one of one pixel, and a third that evaluation leaves out."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 6, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.pool = nn.MaxPool2d(2)
        self.mix = nn.Conv2d(6, 6, 1)
        self.unused = nn.Conv2d(6, 6, 3)
        self.head = nn.Linear(6, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.mix(self.pool(self.norm(self.first(x)).relu()))
        if self.training:
            maps = maps + 0 * self.unused(maps).mean()
        return self.head(maps.mean((2, 3)))


def tiny_net(input_size: tuple[int, int, int], num_outputs: int) -> nn.Module:
    return TinyNet(input_size[0], num_outputs)


def test_a_torchvision_network_is_torchvisions() -> None:
    torch.manual_seed(0)
    model = build_model("torchvision", SIZE, 5, network="resnet18")
    torch.manual_seed(0)
    expected = resnet18(num_classes=5)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_blocks_are_thirds_of_the_target_layers() -> None:
    model = build_model("torchvision", SIZE, 5, network="resnet18", targeted=True)
    layers = roi_layers(model)
    assert len(layers) == 17
    assert [layer.block for layer in layers.values()] == [0] * 6 + [1] * 6 + [2] * 5
    assert all(max(layer.kernel_size) > 1 for layer in layers.values())


def test_layers_are_chosen_by_patterns_and_by_modules() -> None:
    model = build_model(
        "torchvision", SIZE, 5, network="resnet18", targeted=True, layers=["layer4", "layer?.0.downsample.0"]
    )
    assert set(roi_layers(model)) == {
        *("layer2.0.downsample.0", "layer3.0.downsample.0", "layer4.0.downsample.0"),
        *("layer4.0.conv1", "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2"),
    }
    with pytest.raises(
        ValueError, match=r"model\.layers: of the network's convolutions 'layer5\.0\.conv1'; did you mean"
    ):
        build_model("torchvision", SIZE, 5, network="resnet18", targeted=True, layers=["conv1", "layer5.0.conv1"])


@pytest.mark.parametrize(
    ("name", "least", "added"),
    [
        ("tkn6", 8, {}),
        ("tdn10", 8, {"conv": 0, "transition1.conv": 1, "transition2.conv": 2}),
        ("tstn", 16, {"0.localization.1": 0, "0.localization.5": 0, "0.localization.9": 0}),
    ],
)
def test_every_convolution_of_the_papers_networks(name: str, least: int, added: dict[str, int]) -> None:
    size = (1, least, least)
    own, every = (roi_layers(build_model(name, size, 3, layers=layers)) for layers in (None, "all"))
    blocks = {layer: module.block for layer, module in own.items()}
    assert {layer: module.block for layer, module in every.items()} == {**added, **blocks}
    report = count_macs(build_model(name, size, 3, layers="all"), size)
    assert not [row.name for row in report.layers if "Conv" in row.kind and row.mean_roi is None]


def test_small_images_keep_their_size() -> None:
    plain, small = (
        build_model("torchvision", (1, 24, 24), 5, network="resnet18", stem=stem) for stem in (None, "small")
    )
    assert plain.conv1.weight.shape == small.conv1.weight.shape == (64, 1, 7, 7)
    assert small.conv1.stride == (1, 1)
    assert isinstance(small.maxpool, nn.Identity)
    sizes = {row.name: row.map_size for row in count_macs(small, (1, 24, 24)).layers}
    assert (sizes["conv1"], sizes["layer1.0.conv1"], sizes["layer4.1.conv2"]) == ((24, 24), (24, 24), (3, 3))
    with pytest.raises(ValueError, match=r"model\.stem=small changes nothing: .* of VGG"):
        build_model("torchvision", SIZE, 5, network="vgg13", stem="small")


def test_a_factory_gets_what_it_takes() -> None:
    assert build_model("python", SIZE, 7, factory=tiny_net).head.out_features == 7
    assert build_model("python", SIZE, 10, factory=lambda: TinyNet(3, 10)).head.out_features == 10
    assert build_model("python", SIZE, 8, factory=partial(tiny_net)).head.out_features == 8
    # The convolution that evaluation leaves out has no map, so no ROIs.
    layers = roi_layers(build_model("python", SIZE, 7, factory=tiny_net, targeted=True, layers="all"))
    assert set(layers) == {"first", "mix"}


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: TinyNet(3, 9), r"TinyNet gives \[2, 9\] for two images, not \[2, 10\]"),
        (lambda: TinyNet(1, 10), r"TinyNet can't take images of 3x32x32"),
        (lambda: 3, "gives a int, not a torch.nn.Module"),
        (lambda: 1 / 0, "failed: division by zero"),
        (None, "model=python needs a factory"),
    ],
)
def test_wrong_factories(factory: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model("python", SIZE, 10, factory=factory)  # type: ignore[arg-type]


def test_a_factory_is_found_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets_of_mine.py").write_text(
        "from torch import nn\ndef net(num_outputs):\n    return nn.LazyLinear(1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ValueError, match=r"LazyLinear gives \[2, 3, 32, 1\]"):
        build_model("python", SIZE, 10, factory="nets_of_mine:net")
    with pytest.raises(ValueError, match=r"model\.factory=nets_of_mine:nat: nets_of_mine has no function nat"):
        build_model("python", SIZE, 10, factory="nets_of_mine:nat")


def _round_trip(architecture: Architecture) -> Architecture:
    return Architecture.from_dict(architecture.to_dict())


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dn10", {}),
        ("torchvision", {"network": "mobilenet_v3_small"}),
        ("stn", {}),
        ("timm", {"network": "mobilenetv3_small_050"}),  # norms with an activation, convolutions that pad themselves
        ("timm", {"network": "tf_efficientnet_b0"}),
    ],
)
def test_a_thin_network_is_made_again_from_its_widths(name: str, options: dict[str, str], share: float) -> None:
    if name == "timm":
        pytest.importorskip("timm")
    model, architecture = thin_network(Architecture(name, SIZE, 10, options, FLAT), share)
    assert model.training
    narrowed = architecture.narrowed
    assert narrowed is not None
    assert count_macs(model, SIZE).total_dense == narrowed.macs == pytest.approx(narrowed.wanted, rel=0.05)
    assert narrowed.wanted == round(share * narrowed.baseline_macs)
    again = _round_trip(architecture).build()
    again.load_state_dict(model.state_dict())
    x = torch.rand(2, *SIZE)
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert list(map(type, again.modules())) == list(map(type, model.modules()))
    assert architecture.title.startswith(f"{architecture.base_title} thin ")


class TiedNet(nn.Sequential):
    """The third convolution has the second one's weights, as long as neither gets other ones."""

    def __init__(self, outputs: int) -> None:
        super().__init__(
            *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs)),
        )
        self[4].weight = self[2].weight


def tied_net(num_outputs: int) -> nn.Module:
    return TiedNet(num_outputs)


def test_a_network_that_its_widths_do_not_tell_is_refused() -> None:
    whole = count_macs(TiedNet(10), SIZE).total_dense
    # No width changes, and thinning gave each its own weights.
    with pytest.raises(ValueError, match="made narrower can't be made again from its widths"):
        thin_network(Architecture("python", SIZE, 10, {"factory": "tied:net"}, FLAT), whole - 1, tied_net)


def test_impossible_thinness() -> None:
    dn10 = Architecture("dn10", SIZE, 10, {}, FLAT)
    with pytest.raises(ValueError, match=r"model\.thin=10: the least that dn10 can have is \d+ multiply-adds"):
        thin_network(dn10, 10)
    with pytest.raises(ValueError, match=r"model\.thin=1e\+09 must be below the \d+ multiply-adds of dn10"):
        thin_network(dn10, 1e9)
    with pytest.raises(ValueError, match="tdn10 has target layers"):
        thin_network(Architecture("tdn10", SIZE, 10, {}, FLAT), 0.5)


def test_a_file_does_not_run_code() -> None:
    architecture = _round_trip(Architecture("python", SIZE, 10, {"factory": "os:getcwd"}, FLAT))
    with pytest.raises(ValueError, match="made by os:getcwd, code that is not in the file"):
        architecture.build()
    with pytest.raises(ValueError, match="does not say what network"):
        Architecture.from_dict({"name": "dn10"})


def test_weights_begin_a_network_of_other_classes(tmp_path: Path) -> None:
    trained = TinyNet(3, 10)
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    for file in ("weights.pt", "weights.safetensors"):
        model = build_model("python", SIZE, 4, factory=tiny_net, targeted=True)
        head = model.head.weight.clone()
        loaded = fit_weights(model, read_weights(tmp_path / file), "model.weights=w")
        assert loaded == {"first.weight", "norm.weight", "norm.bias", *_both("mix"), *_both("unused")}
        assert torch.equal(model.first.weight, trained.first.weight)
        assert torch.equal(model.head.weight, head)
    same = TinyNet(3, 10)
    assert "head.weight" in fit_weights(same, trained.state_dict(), "model.weights=w")
    grey = TinyNet(1, 10)
    fit_weights(grey, trained.state_dict(), "model.weights=w")
    x = torch.rand(2, 1, 32, 32)
    # Summed kernels see a grey image as the colour image of three equal channels.
    torch.testing.assert_close(grey.eval()(x), trained.eval()(x.expand(-1, 3, -1, -1)))


def _both(layer: str) -> tuple[str, str]:
    return f"{layer}.weight", f"{layer}.bias"


def test_weights_of_another_network_are_named(tmp_path: Path) -> None:
    weights = build_model("torchvision", SIZE, 10, network="resnet18").state_dict()
    with pytest.raises(
        ValueError,
        match=r"model\.weights=w is not of this network: it has no layer1.0.conv3.weight and \d+ more, ",
    ):
        fit_weights(build_model("torchvision", SIZE, 10, network="resnet50"), weights, "model.weights=w")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_weights(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(ValueError, match="is damaged or no file of weights"):
        read_weights(tmp_path / "text.pt")
    torch.save({"a": 1}, tmp_path / "number.pt")
    with pytest.raises(ValueError, match="holds no tensors by name"):
        read_weights(tmp_path / "number.pt")


def test_a_network_without_convolutions_of_images() -> None:
    def flat_net(num_outputs: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 3), nn.Flatten(), nn.LazyLinear(num_outputs))

    trained, model = (build_model("python", SIZE, 10, factory=flat_net) for _ in range(2))
    names = fit_weights(model, trained.state_dict(), "model.weights=w")
    assert names == {"1.weight", "1.bias", "3.weight", "3.bias"}
    assert torch.equal(model[1].weight, trained[1].weight)
    with pytest.raises(ValueError, match=r"model\.stem=small: Sequential has no convolution of images"):
        build_model("python", SIZE, 10, factory=flat_net, stem="small")


@pytest.mark.parametrize("network", ["googlenet", "inception_v3"])
def test_weights_for_images_in_another_range_are_refused(network: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.weights=DEFAULT of {network} expects images in another range"):
        default_weights("torchvision", (3, 299, 299), 10, {"network": network})


def test_freezing() -> None:
    model = build_model("torchvision", SIZE, 10, network="resnet18")
    freeze_(model, ["conv1", "bn1", "layer[12]"])
    learning = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {"layer3", "layer4", "fc"}
    assert len(frozen_norms(model, ["conv1", "bn1", "layer[12]"])) == 10
    with pytest.raises(ValueError, match=r"model\.freeze: of the network's parameters 'layer9'"):
        freeze_(model, ["layer9"])
    with pytest.raises(ValueError, match="leaves nothing to learn"):
        freeze_(model, ["*"])
