"""engine="auto": measured once for what matters, the faster taken, and remembered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_cases import engine_of, targeted
from torch import Tensor, nn

from tkn import TargetConv2d
from tkn.backends.torch.fourier import use_fourier
from tkn.ops import choose, target
from tkn.ops.choose import Choices
from tkn.sequential import TargetSequential


class Stopwatch:
    """Stands for `measure`: seconds by engine, and what was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, roi: float, dense: float) -> None:
        self.seconds = {"roi": roi, "dense": dense}
        self.measured: list[str] = []
        running: list[str] = []
        for name in ("roi", "dense"):
            compute = getattr(target, f"_{name}")
            monkeypatch.setattr(
                target, f"_{name}", lambda *args, name=name, compute=compute: (running.append(name), compute(*args))[1]
            )

        def measure(run: Callable[[], object]) -> float:
            running.clear()
            run()
            self.measured.append(running[0])
            return self.seconds[running[0]]

        monkeypatch.setattr(choose, "measure", measure)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder; nothing remembered."""
    monkeypatch.setenv("TKN_CACHE_DIR", str(tmp_path / "cache"))
    restart(monkeypatch)
    return tmp_path / "cache"


def restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(target, "choices", Choices())


def layer(scale: float = 0.4, *, inputs: int = 16, **options: object) -> TargetConv2d:
    """A target layer worth measuring on maps of 16 x 16."""
    torch.manual_seed(0)
    made = TargetConv2d(inputs, 16, 5, padding=2, **options)
    nn.init.constant_(made.scale, scale)
    return made


def images(batch: int = 3, inputs: int = 16) -> Tensor:
    return torch.randn(batch, inputs, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("roi", "dense", "chosen"), [(1, 2, "roi"), (2, 1, "dense"), (1, 1, "dense")])
def test_the_faster_is_taken(monkeypatch: pytest.MonkeyPatch, roi: float, dense: float, chosen: str) -> None:
    stopwatch = Stopwatch(monkeypatch, roi=roi, dense=dense)
    auto = layer()
    for _ in range(3):
        assert engine_of(auto(images())) == chosen
    assert sorted(stopwatch.measured) == ["dense", "roi"]


def test_measured_once_per_layer_batch_and_share(monkeypatch: pytest.MonkeyPatch) -> None:
    stopwatch = Stopwatch(monkeypatch, roi=1, dense=2)
    auto, x = layer(0.4), images()

    def newly(network: nn.Module, x: Tensor) -> list[str]:
        stopwatch.measured.clear()
        network(x)
        network(x)
        return sorted(stopwatch.measured)

    assert newly(auto, x) == ["dense", "roi"]
    nn.init.constant_(auto.loc, 0.5 - 1 / 16)  # as large, elsewhere
    assert newly(auto, x) == []
    nn.init.constant_(auto.scale, 0.2)  # much smaller: torch's time is known
    assert newly(auto, x) == ["roi"]
    nn.init.constant_(auto.scale, 0.4)
    assert newly(auto, x) == []
    assert newly(auto, images(4)) == ["dense", "roi"]
    assert newly(layer(0.4), x) == []  # the same layer again
    assert newly(layer(0.4, inputs=20), images(inputs=20)) == ["dense", "roi"]
    assert newly(layer(0.4), images(6)) == ["dense", "roi"]
    assert newly(layer(0.4, groups=2), images(6)) == ["dense", "roi"]
    assert newly(layer(0.4).double(), x.double()) == ["dense", "roi"]
    with torch.no_grad():
        assert newly(auto, x) == ["dense", "roi"]
    large, x128 = TargetConv2d(128, 128, 3), images(inputs=128)
    nn.init.constant_(large.scale, 0.4)
    assert newly(large, x128) == ["dense", "roi"]
    use_fourier(large)
    assert newly(large, x128) == ["dense", "roi"]
    assert newly(auto, x.clone().requires_grad_()) == ["dense", "roi"]
    assert newly(TargetSequential(auto, nn.ReLU()), x) == ["dense", "roi"]
    assert newly(TargetSequential(auto, nn.ReLU(), nn.MaxPool2d(2)), x) == ["dense", "roi"]


def test_states_that_larger_rois_show_to_be_hopeless_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    stopwatch = Stopwatch(monkeypatch, roi=10, dense=1)
    auto = layer(0.5)  # 12 x 12 of 16 x 16 pixels
    assert engine_of(auto(images())) == "dense"
    assert sorted(stopwatch.measured) == ["dense", "roi"]
    nn.init.constant_(auto.scale, 0.4)  # 10 x 10: about 7 times torch's time
    assert engine_of(auto(images())) == "dense"
    nn.init.constant_(auto.scale, 0.65)  # larger ones tell nothing of these
    stopwatch.seconds["roi"] = 0.5
    assert engine_of(auto(images())) == "roi"
    nn.init.constant_(auto.scale, 0.2)  # 4 x 4: may be as fast
    assert engine_of(auto(images())) == "roi"
    assert sorted(stopwatch.measured) == ["dense", "roi", "roi", "roi"]


@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (lambda: layer(1.0), 3),  # full
        (lambda: layer(0.69), 3),  # nearly full
        (lambda: layer(0.2, inputs=1), 1),  # tiny
        (lambda: layer(clip=False), 3),
        (lambda: layer(padding_mode="reflect"), 3),
    ],
    ids=["full", "nearly full", "tiny", "soft", "other padding"],
)
def test_what_is_never_measured(monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module], batch: int) -> None:
    stopwatch = Stopwatch(monkeypatch, roi=1, dense=2)
    auto = make()
    assert engine_of(auto(images(batch, auto.in_channels))) == "dense"
    assert stopwatch.measured == []


def test_other_engines_are_never_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    stopwatch = Stopwatch(monkeypatch, roi=1, dense=2)
    assert engine_of(layer(engine="dense")(images())) == "dense"
    assert engine_of(layer(1.0, engine="roi")(images())) == "roi"
    assert stopwatch.measured == []


def test_measuring_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in gradients, the random state, or the layer."""
    Stopwatch(monkeypatch, roi=1, dense=2)
    auto = layer()
    calls = []
    auto.register_forward_hook(lambda *_: calls.append(1))
    before = {name: parameter.detach().clone() for name, parameter in auto.named_parameters()}
    state = torch.get_rng_state()
    x = images().requires_grad_()
    output = auto(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert calls == [1]
    assert x.grad is None
    for name, parameter in auto.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    output.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_measured_in_any_mode(monkeypatch: pytest.MonkeyPatch, mode: Callable[[], object]) -> None:
    stopwatch = Stopwatch(monkeypatch, roi=1, dense=2)
    auto = layer()
    with mode():
        auto(images())
    assert sorted(stopwatch.measured) == ["dense", "roi"]
    auto(images()).sum().backward()
    assert auto.loc.grad.isfinite().all()


@pytest.mark.parametrize(("roi", "chosen"), [(1, "roi"), (3, "dense")])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_halves_under_autocast(monkeypatch: pytest.MonkeyPatch, kind: torch.dtype, roi: float, chosen: str) -> None:
    """Such as a dense convolution before leaves: the engine sums them in float32."""
    stopwatch = Stopwatch(monkeypatch, roi=roi, dense=2)
    auto, x = layer(), images().to(kind).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = auto(x)
        assert engine_of(output) == chosen
        output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == kind
    assert sorted(stopwatch.measured) == ["dense", "roi"]
    assert engine_of(auto(x.float())) == chosen
    auto.to(kind)
    assert engine_of(auto(x)) == "dense"  # no autocast to choose the type


def test_autocast_leaves_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    Stopwatch(monkeypatch, roi=1, dense=2)
    auto, x = layer().double(), images().double()
    expected = auto(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = auto(x)
    assert engine_of(output) == "roi"
    assert torch.equal(output, expected)


def test_a_new_process_remembers(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    Stopwatch(monkeypatch, roi=1, dense=2)
    layer()(images())
    kept = json.loads((folder / "engine_seconds.json").read_text())
    assert sorted(kept.values()) == [1, 2]
    restart(monkeypatch)
    stopwatch = Stopwatch(monkeypatch, roi=2, dense=1)  # would choose otherwise
    assert engine_of(layer()(images())) == "roi"
    assert stopwatch.measured == []


def test_processes_keep_each_others_measurements(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    Stopwatch(monkeypatch, roi=1, dense=2)
    first, second = Choices(), Choices()
    for choices, batch in ((first, 3), (second, 4), (first, 5)):
        monkeypatch.setattr(target, "choices", choices)
        layer()(images(batch))
    kept = json.loads((folder / "engine_seconds.json").read_text())
    assert len(kept) == 6
    assert [path.name for path in folder.iterdir()] == ["engine_seconds.json"]


def test_other_threads_are_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    stopwatch = Stopwatch(monkeypatch, roi=1, dense=2)
    layer()(images())
    torch.set_num_threads(2)
    try:
        layer()(images())
    finally:
        torch.set_num_threads(1)
    assert len(stopwatch.measured) == 4


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null", '{"a": "b"}', '{"a": null}', "\x00\x01", '{"a": [1]}'])
def test_unreadable_files_are_measured_anew(monkeypatch: pytest.MonkeyPatch, folder: Path, content: str) -> None:
    folder.mkdir()
    (folder / "engine_seconds.json").write_text(content)
    stopwatch = Stopwatch(monkeypatch, roi=1, dense=2)
    assert engine_of(layer()(images())) == "roi"
    assert len(stopwatch.measured) == 2
    assert sorted(json.loads((folder / "engine_seconds.json").read_text()).values()) == [1, 2]


def test_bytes_that_are_no_text(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    folder.mkdir()
    (folder / "engine_seconds.json").write_bytes(b"\xff\xfe{}")
    Stopwatch(monkeypatch, roi=1, dense=2)
    assert engine_of(layer()(images())) == "roi"


@pytest.mark.parametrize("obstacle", ["file is a folder", "folder is a file"])
def test_files_that_can_not_be_written(monkeypatch: pytest.MonkeyPatch, folder: Path, obstacle: str) -> None:
    if obstacle == "file is a folder":
        (folder / "engine_seconds.json").mkdir(parents=True)
    else:
        folder.write_text("")
    stopwatch = Stopwatch(monkeypatch, roi=1, dense=2)
    for _ in range(2):
        assert engine_of(layer()(images())) == "roi"
    assert len(stopwatch.measured) == 2


def test_measured_on_the_rows_that_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine skips inputs outside of the ROIs of the layer before, which torch can't."""
    stopwatch = Stopwatch(monkeypatch, roi=1, dense=2)
    seen: list[int] = []
    compute = target._roi
    monkeypatch.setattr(
        target,
        "_roi",
        lambda layer, x, *args: (seen.append(x.rows.live) if layer is second else None, compute(layer, x, *args))[1],
    )
    first, second = layer(0.6), layer(0.4)
    chain = TargetSequential(first, nn.ReLU(), second)
    chain(images())
    assert sorted(stopwatch.measured) == ["dense", "dense", "roi", "roi"]
    whole = seen[0]
    assert set(seen) == {whole}
    stopwatch.measured.clear()
    seen.clear()
    nn.init.constant_(first.scale, 0.3)
    chain(images())
    assert sorted(stopwatch.measured) == ["dense", "roi", "roi"]  # the first layer's torch is known
    assert len(seen) == 2  # measured, and then computed
    assert set(seen) == {seen[0]} < {*range(whole // 2)}


def test_the_choice_of_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers choose one by one; what one hands on the other takes."""
    Stopwatch(monkeypatch, roi=1, dense=2)
    torch.manual_seed(0)
    chain = TargetSequential(
        TargetConv2d(16, 16, 5, padding=2), nn.ReLU(), TargetConv2d(16, 3, 1), nn.ReLU(), TargetConv2d(3, 64, 5)
    )
    targeted(chain, seed=1)
    nn.init.constant_(chain[2].scale, 1)  # full, and so torch's
    x = images(8)
    outputs = nn.Sequential.forward(chain, x)
    torch.testing.assert_close(chain(x), outputs, rtol=1e-4, atol=1e-5)


def test_measure_takes_the_least_of_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 5.0, 10.0, 12.0, 20.0, 29.0])
    calls = []
    monkeypatch.setattr(choose.time, "perf_counter", lambda: next(times))
    assert choose.measure(lambda: calls.append(1)) == 2.0
    assert len(calls) == 4  # the first to warm up
