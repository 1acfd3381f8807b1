"""Runs of one's own networks, of narrower ones and of trained ones, from the command's arguments to load_model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import TKN_RUN, run_forked
from runs import TINY

import tkn
from tkn.cli import compose, main
from tkn.layers import roi_layers

pytestmark = pytest.mark.usefixtures("empty_pictures")
EPOCH = (*TINY, "trainer.max_epochs=1")
SIZE = (1, 28, 28)
NETS = """
from torch import nn

def net(input_size, num_outputs):
    return nn.Sequential(
        nn.Conv2d(input_size[0], 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_outputs),
    )
"""
NET = ("model=python", "model.factory=nets_of_these_tests:net")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, in which a user's module lies."""
    (tmp_path / "nets_of_these_tests.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "nets_of_these_tests", raising=False)
    return tmp_path


def _run(folder: Path, *arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return tkn.run(compose(*EPOCH, *arguments), folder)


def _assert_loads(folder: Path, objects: dict[str, Any], **options: Any) -> None:
    """`load_model` gives the network that the run ended with."""
    loaded, trained = tkn.load_model(folder / "last.ckpt", **options), objects["module"].model
    assert not any(module.training for module in loaded.modules())
    for name, value in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    x = torch.rand(2, *SIZE)
    with torch.no_grad():
        # Another memory format rounds otherwise.
        torch.testing.assert_close(loaded(x), trained.eval()(x), rtol=1e-3, atol=1e-3)


def test_the_command_trains_a_factorys_network(tmp_path: Path) -> None:
    """In a process of its own, whose import path does not begin with the working folder."""
    (tmp_path / "nets_of_these_tests.py").write_text(NETS)
    done = run_forked(
        f"import sys; sys.path.pop(0); {TKN_RUN}",
        *(*EPOCH, *NET, "model.targeted=true", "model.layers=all", "hydra.run.dir=run"),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(ValueError, match=r"last\.ckpt: the network is made by nets_of_these_tests:net, code that"):
        tkn.load_model(tmp_path / "run" / "last.ckpt")


def test_a_factorys_network_is_trained_tested_and_loaded(folder: Path) -> None:
    arguments = (*NET, "model.targeted=true", "model.layers=[0,3]", "penalty.l2=1")
    trained, objects = _run(folder / "trained", *arguments)
    assert (trained["model"], trained["base_model"]) == ("targeted net", "net")
    assert [row["name"] for row in trained["target_layers"]] == ["0", "3"]
    assert trained["macs_roi"] < trained["macs_dense"]
    checkpoint = folder / "trained" / "last.ckpt"
    tested, _ = _run(folder / "tested", *arguments, "mode=test", f"checkpoint={checkpoint}")
    for key in ("error", "macs_roi", "target_layers", "model"):
        assert tested[key] == trained[key], key
    _assert_loads(folder / "trained", objects, factory="nets_of_these_tests:net")
    with pytest.raises(ValueError, match=r"is of model\.layers=\[0, 3\], but this run is of model\.layers=all"):
        _run(folder / "other", *NET, "model.targeted=true", "model.layers=all", "mode=test", f"checkpoint={checkpoint}")


def test_a_torchvision_network_for_small_grey_images(tmp_path: Path) -> None:
    arguments = ("model=torchvision", "model.network=squeezenet1_1", "model.stem=small", "model.targeted=true")
    summary, objects = _run(tmp_path, *arguments, "recipe.optimizer.lr=0.01")
    assert (summary["model"], len(summary["target_layers"])) == ("targeted squeezenet1_1", 9)
    _assert_loads(tmp_path, objects)


def test_a_timm_network(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    arguments = ("model=timm", "model.network=mobilenetv3_small_050", "model.dropout=0.1")
    summary, objects = _run(tmp_path, *arguments)
    assert summary["model"] == "mobilenetv3_small_050"
    _assert_loads(tmp_path, objects)


def test_every_convolution_of_a_paper_network(tmp_path: Path) -> None:
    summary, objects = _run(tmp_path, "model=tdn10", "model.layers=all", "penalty.l2=1")
    assert [row["name"] for row in summary["target_layers"]][:2] == ["conv", "block1.0.layers.conv1"]
    assert len(summary["target_layers"]) == 9
    _assert_loads(tmp_path, objects)


def test_a_thin_network(tmp_path: Path) -> None:
    arguments = ("model=dn10", "model.thin=6.0e6")
    summary, objects = _run(tmp_path / "thin", *arguments)
    assert (summary["model"], summary["base_model"]) == ("dn10 thin 6.0M", "dn10")
    narrowed = summary["narrowed"]
    assert (narrowed["by"], narrowed["wanted"], narrowed["baseline_macs"]) == ("thin", 6_000_000, 11_317_030)
    assert summary["macs_dense"] == summary["macs_roi"] == narrowed["macs"] == pytest.approx(6.0e6, rel=0.02)
    assert narrowed["widths"]["fc"] == [objects["module"].model.fc.in_features, 10]
    assert (summary["input_size"], summary["num_outputs"]) == ([1, 28, 28], 10)
    _assert_loads(tmp_path / "thin", objects)
    checkpoint = f"checkpoint={tmp_path / 'thin' / 'last.ckpt'}"
    tested, _ = _run(tmp_path / "test", *arguments, "mode=test", checkpoint)
    assert (tested["error"], tested["macs_dense"]) == (summary["error"], summary["macs_dense"])
    with pytest.raises(ValueError, match=r"is of model\.thin=6000000\.0, but this run is of model\.thin=None"):
        _run(tmp_path / "dense", "model=dn10", "mode=test", checkpoint)


def test_a_pruned_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_pruning")
    _run(tmp_path / "dense", "model=dn10")
    pruning = (f"channels.checkpoint={tmp_path / 'dense' / 'last.ckpt'}", "channels.macs=4.0e6")
    summary, objects = _run(tmp_path / "pruned", "model=dn10", *pruning)
    assert summary["model"] == "dn10 channels 4.0M"
    assert summary["macs_dense"] == summary["narrowed"]["macs"] == pytest.approx(4.0e6, rel=0.02)
    assert objects["module"].optimizers().param_groups[0]["initial_lr"] == pytest.approx(0.01)
    checkpoint = f"checkpoint={tmp_path / 'pruned' / 'last.ckpt'}"
    tkn.run(compose(*TINY, "trainer.max_epochs=2", "model=dn10", *pruning, checkpoint), tmp_path / "longer")
    with pytest.raises(ValueError, match=r"channels\.checkpoint=.* is of model=dn10, but this run is of model=dn40"):
        _run(tmp_path / "other", "model=dn40", *pruning)
    again = (f"channels.checkpoint={tmp_path / 'pruned' / 'last.ckpt'}", "channels.macs=3.0e6")
    with pytest.raises(ValueError, match=r"channels\.checkpoint=.*last\.ckpt is of a network that is narrower already"):
        _run(tmp_path / "twice", "model=dn10", *again)
    for other in ("channels.lr_factor=0.5", "channels.checkpoint=elsewhere.ckpt", "channels.macs=5000000.0"):
        with pytest.raises(ValueError, match=rf"is of {other.partition('=')[0]}=.*, but this run is of {other}"):
            _run(tmp_path / "changed", "model=dn10", *pruning, other, checkpoint)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    _assert_loads(tmp_path / "pruned", objects)
    tested, _ = _run(tmp_path / "test", "model=dn10", "mode=test", checkpoint)
    assert (tested["error"], tested["model"]) == (summary["error"], summary["model"])


def test_fine_tuning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, dense = _run(folder / "dense", *NET, "recipe.optimizer.lr=0.3")
    trained = dense["module"].model.state_dict()
    arguments = (
        *(*NET, "model.targeted=true", f"model.weights={folder / 'dense' / 'last.ckpt'}"),
        *("model.freeze=['0','1']", "model.pretrained_lr_factor=0.1", "recipe.ema_decay=0.5"),
    )
    said = "model.weights were trained without windows; attention=cauchy changes what they compute"
    with caplog.at_level("WARNING"):
        _run(folder / "flat", *arguments, "attention=flat")
        assert said not in caplog.text
        _, objects = _run(folder / "tuned", *arguments)
    assert said in caplog.text
    module = objects["module"]
    for network in (module.model, module.raw):
        for name in ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
            assert torch.equal(network.state_dict()[name], trained[name]), name
        assert not torch.equal(network.state_dict()["3.weight"], trained["3.weight"])
        assert not network.get_parameter("0.weight").requires_grad
        assert not network.get_parameter("0.loc").requires_grad
        assert network.get_parameter("3.weight").requires_grad
    new, attention, pretrained = module.optimizers().param_groups
    assert not new["params"]
    assert [len(group["params"]) for group in (attention, pretrained)] == [2, 6]
    assert pretrained["initial_lr"] == pytest.approx(0.1 * attention["initial_lr"])
    # The file need not be there any more.
    (folder / "dense" / "last.ckpt").unlink()
    checkpoint = f"checkpoint={folder / 'tuned' / 'last.ckpt'}"
    longer, _ = tkn.run(compose(*TINY, *arguments, "trainer.max_epochs=2", checkpoint), folder / "longer")
    assert longer["epochs"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model=dn10", "model.freeze=block9"), "model.freeze: of the network's parameters 'block9'"),
        (("model=tdn10", "model.layers=block9"), "model.layers: of the network's convolutions 'block9'"),
        (("model=dn10", "model.thin=1000"), "model.thin=1000: the least that dn10 can have is"),
        (("model=dn10", "model.weights=none.pt"), "model.weights=none.pt is not a file"),
        (("model=dn10", "model.weights=DEFAULT"), "model.weights=DEFAULT: dn10 has no pretrained weights, name a file"),
        (("model=torchvision", "model.network=inception_v3"), "Inception3 can't take images of 1x28x28 (C x H x W)"),
    ],
)
def test_what_does_not_fit_the_data_ends_the_run(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises((ValueError, OSError)) as raised:
        _run(tmp_path, *arguments)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_wrong_networks_are_one_line(wrong_arguments: Any) -> None:
    line = wrong_arguments(main, "model=torchvision", "model.network=resnet81")
    assert line == "tkn-run: error: unknown model.network of torchvision 'resnet81'; did you mean 'resnet18'?"
    line = wrong_arguments(main, "model=torchvision", "model.netwrk=resnet18")
    assert line == "tkn-run: error: unknown key 'model.netwrk'; did you mean 'model.network'?"


def test_a_damaged_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a file"):
        tkn.load_model(tmp_path / "last.ckpt")
    _, objects = _run(tmp_path, "model=dn10")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    checkpoint["tkn"]["architecture"]["narrowed"] = {
        **{"by": "thin", "wanted": 1, "macs": 1, "baseline_macs": 1},
        "widths": {"no.such": [1, 2]},
    }
    torch.save(checkpoint, tmp_path / "widths.ckpt")
    with pytest.raises(ValueError, match=r"widths\.ckpt: the network has no layer 'no\.such' of widths \[1, 2\]"):
        tkn.load_model(tmp_path / "widths.ckpt")
    # A checkpoint of an earlier version.
    del checkpoint["tkn"]["architecture"]
    torch.save(checkpoint, tmp_path / "earlier.ckpt")
    assert not roi_layers(tkn.load_model(tmp_path / "earlier.ckpt"))
    (tmp_path / "earlier.ckpt").rename(tmp_path / "last.ckpt")
    _assert_loads(tmp_path, objects)
