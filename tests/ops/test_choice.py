"""engine="auto": the faster engine by estimate, or by what `tkn.tune` measured; nothing is timed in a forward pass."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_cases import engine_of, targeted
from torch import Tensor, nn

import tkn
from tkn import TargetConv2d, costs
from tkn.backends.cpu import backend, build, factors
from tkn.backends.torch.fourier import use_fourier
from tkn.bench import costs as fitting
from tkn.kept import Kept
from tkn.ops import choice, segments, sticky, tuned, tuning
from tkn.sequential import TargetSequential
from tkn.work import Work


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder where nothing was measured."""
    monkeypatch.setattr(tuned, "cache_dir", lambda: tmp_path)
    in_a_new_process(monkeypatch)
    return tmp_path


def in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known but what the files hold."""
    monkeypatch.setattr(tuned, "_tables", {})
    monkeypatch.setattr(sticky, "_choices", Kept(4096))


def layer(scale: float = 0.3, **options: object) -> TargetConv2d:
    torch.manual_seed(0)
    made = TargetConv2d(16, 16, 5, padding=2, **options)
    nn.init.constant_(made.scale, scale)
    return made


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 16, 16, 16, generator=torch.Generator().manual_seed(0))


def estimates(monkeypatch: pytest.MonkeyPatch, *, roi: float, dense: float) -> list[Work]:
    """Lets every layer be estimated so; what was asked for."""
    asked: list[Work] = []

    def seconds(engine: str, work: Work) -> float:
        asked.append(work)
        return roi if engine == "roi" else dense

    monkeypatch.setattr(backend, "seconds", seconds)
    return asked


@pytest.mark.parametrize(("roi", "dense", "chosen"), [(1, 2, "roi"), (2, 1, "dense"), (1, 1, "dense")])
def test_the_faster_by_estimate_is_taken(
    monkeypatch: pytest.MonkeyPatch, roi: float, dense: float, chosen: str
) -> None:
    estimates(monkeypatch, roi=roi, dense=dense)
    assert engine_of(layer()(images())) == chosen
    assert layer().why(images()) == ("roi" if chosen == "roi" else "dense: torch is estimated to be faster")


def test_what_an_estimate_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = estimates(monkeypatch, roi=1, dense=2)
    network = TargetSequential(layer(0.25), nn.ReLU(), nn.MaxPool2d(2), layer(0.25, groups=2))
    use_fourier(network)
    with torch.autocast("cpu", torch.bfloat16):
        network(images(5).requires_grad_())
    first, second = asked[0], asked[-1]
    assert (first.batch, first.channels, first.outputs, first.size, first.output) == (5, 16, 16, (16, 16), (16, 16))
    assert (first.kernel, first.relu, first.pool, first.training, first.needs_x) == ((5, 5), True, (2, 2), True, True)
    assert first.dtype == torch.bfloat16
    assert first.share == pytest.approx(36 / 256)  # 6 x 6 pixels
    assert (first.live, second.live) == (1.0, pytest.approx(16 / 64))  # pooled to 4 x 4 of 8 x 8
    assert (second.groups, second.size, second.pool) == (2, (8, 8), None)
    assert second.macs == 5 * 64 * 25 * 16 * 8
    with torch.no_grad():
        network(images())
    assert not asked[-1].training


def test_layers_without_rois_and_other_types_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    estimates(monkeypatch, roi=1, dense=2)
    assert layer(clip=False).why(images()).startswith("dense")
    assert layer().why(images()[0]) == "dense: an input of shape [16, 16, 16] is torch's"
    assert layer(engine="dense").why(images()) == "dense: engine='dense'"
    mixed = layer().double()
    assert "parameters of the input's type" in mixed.why(images())
    assert tkn.TargetConv1d(1, 1, 1).why(torch.rand(1, 1, 4)) == "roi"
    assert tkn.TargetConv3d(1, 1, 1).why(torch.rand(1, 1, 4, 3, 2)) == "roi"


def test_nothing_is_timed_in_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: pytest.fail("timed"))
    layer(0.2)(images()).sum().backward()


def test_each_layer_of_a_sequence_has_its_own_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "is_faster", lambda _, work: work.outputs == 8)
    torch.manual_seed(0)
    network = TargetSequential(TargetConv2d(3, 8, 3, padding=1), TargetConv2d(8, 6, 3), TargetConv2d(6, 8, 3))
    x = torch.rand(2, 3, 9, 9)
    targeted(network, seed=1)
    engines = [engine_of(network[: count + 1](x)) for count in range(3)]
    assert engines == ["roi", "dense", "roi"]
    expected = copy.deepcopy(network).double()
    for module in expected:
        module.engine = "dense"
    torch.testing.assert_close(network(x).double(), expected(x.double()), rtol=1e-5, atol=1e-6)


def test_what_was_tuned_holds(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    estimates(monkeypatch, roi=2, dense=1)
    auto = layer()
    assert engine_of(auto(images())) == "dense"
    monkeypatch.setattr(tuning, "_in_turns", lambda _, flags: {flag: 1.0 if flag[0] else 2.0 for flag in flags})
    (found,) = tkn.tune(auto, 3, (16, 16, 16), training=True)
    assert (found.layers, found.engines) == (("(model)",), ("roi",))
    assert str(found) == "(model): roi (roi 1e+03 ms, dense 2e+03 ms)"
    # The input's gradient was not asked for when it was measured.
    assert engine_of(auto(images())) == "roi"
    in_a_new_process(monkeypatch)
    assert engine_of(auto(images())) == "roi"
    nn.init.constant_(auto.loc, 0.5 - 1 / 16)  # as large, elsewhere
    assert engine_of(auto(images())) == "roi"
    assert engine_of(auto(images(4))) == "dense"  # another batch: not measured
    nn.init.constant_(auto.scale, 0.6)
    assert engine_of(auto(images())) == "dense"
    assert json.loads(next(folder.glob("tuned_*.json")).read_text())


def test_tuning_for_real_changes_nothing_but_the_choice() -> None:
    torch.manual_seed(0)
    network = TargetSequential(layer(0.2), nn.BatchNorm2d(16), nn.ReLU(), layer(1.0), nn.Dropout()).train()
    before = copy.deepcopy(network.state_dict())
    found = tkn.tune(network, 2, (16, 16, 16), training=True)
    assert [one.layers for one in found] == [("0",), ("3",)]
    for one in found:
        assert {what for what, _ in one.seconds} == {"roi", "dense"}
        assert one.engines[0] == one.seconds[0][0]
    assert network.training
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        tkn.tune(network, 0, (16, 16, 16))


def test_tuning_a_sequence_tries_its_layers_one_by_one() -> None:
    network = TargetSequential(layer(0.2), nn.ReLU(), layer(0.2), nn.ReLU(), layer(1.0))
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = tkn.tune(network, 2, (16, 16, 16))
    assert found.layers == ("0", "2", "4")
    assert len(found.seconds) >= 4


def test_layers_that_are_alike_are_measured_once_and_all_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(tuning, "_in_turns", lambda call, flags: (asked.append(call), dict.fromkeys(flags, 1.0))[1])
    network = TargetSequential(layer(), nn.BatchNorm2d(16), layer(), nn.BatchNorm2d(16), layer())
    found = tkn.tune(network, 2, (16, 16, 16))
    assert [one.layers for one in found] == [("0",), ("2",), ("4",)]
    assert len(asked) == 1


def test_a_damaged_or_forbidden_file_is_no_error(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    tkn.tune(layer(), 1, (16, 16, 16))
    (path,) = folder.glob("tuned_*.json")
    path.write_text('{"a": 3')
    monkeypatch.setattr(tuned, "_tables", {})
    layer()(images())
    (folder / "file").write_text("")
    monkeypatch.setattr(tuned, "cache_dir", lambda: folder / "file")
    monkeypatch.setattr(tuning, "_in_turns", lambda _, flags: {flag: 1.0 if flag[0] else 2.0 for flag in flags})
    tkn.tune(layer(), 1, (16, 16, 16))
    with torch.no_grad():
        assert layer().why(images(1)) == "roi"  # this process knows


def work(**changes: object) -> Work:
    made = segments.work_of(
        (16, 32, 14, 14),
        TargetConv2d(32, 48, 3, padding=1).target(),
        1.0,
        segments.Call(torch.float32, False, False, False, True),
        needs_x=False,
        fourier=False,
    )
    return replace(made, **changes)


@pytest.mark.parametrize("engine", ["dense", "roi"])
def test_estimates_grow_with_the_work(engine: str) -> None:
    def seconds(**changes: object) -> float:
        return costs.seconds(engine, work(**changes), {})

    assert 0 < seconds() < 1
    assert seconds(batch=64) > seconds() > seconds(outputs=16)
    assert seconds(training=True) > seconds()
    assert (seconds(share=0.1) < seconds()) == (engine == "roi")
    assert seconds(dtype=torch.float64) > seconds()
    assert costs.seconds(engine, work(), {engine: {"single": 3.0}}) == pytest.approx(3 * seconds())
    for kind in (torch.float32, torch.bfloat16):
        for fourier in (False, True):
            assert seconds(dtype=kind, training=True, fourier=fourier) > 0


def test_clear_cases_are_chosen_right() -> None:
    """A few multiply-adds left, and all of them."""
    assert choice.is_faster(backend, work(batch=128, share=0.02))
    assert not choice.is_faster(backend, work(batch=128, share=1.0, channels=256, outputs=256))


@pytest.mark.parametrize(("load", "spread", "kept"), [(0.0, 1.0, True), (1.5, 1.0, False), (0.0, 1.5, False)])
def test_what_a_busy_machine_says_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, load: float, spread: float, kept: bool
) -> None:
    seconds = iter(range(10**6))
    monkeypatch.setattr(factors, "_taken", lambda _: 1.0 if next(seconds) % 3 == 0 else spread)
    monkeypatch.setattr(factors.OtherLoad, "mean", lambda _: load)
    monkeypatch.setattr(build, "factors_file", lambda: tmp_path / "factors.json")
    monkeypatch.setattr(factors, "_LAYERS", factors._LAYERS[1:2])
    assert factors.keep_factors() == kept
    assert (tmp_path / "factors.json").exists() == kept
    found = backend.factors()
    assert bool(found) == kept
    if kept:
        assert {*found["roi"]} == {"single", "half", "single fourier", "half fourier"}


def test_fitting_the_constants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fitting, "least", lambda run: (run(), 1e-3)[1])
    monkeypatch.setattr(fitting, "_WORTH", (2e5, 2e6))
    fitting.sample(tmp_path / "rows.jsonl", 6, seed=1)
    made = fitting.fit([tmp_path / "rows.jsonl"])
    assert capsys.readouterr().out.count("layers, loss 0.0%") == len(made["roi"])
    for engine, counts in (("dense", costs.dense_counts), ("roi", costs.roi_counts)):
        for one, _ in fitting.read([tmp_path / "rows.jsonl"]):
            constants = made[engine][costs.kind_of(one)]
            estimate = sum(c * n for c, n in zip(constants, counts(one), strict=True))
            assert estimate == pytest.approx(1e-3, rel=0.05)
