"""A whole benchmark, small, with a stand-in for this project's engine; its files, tables and speed-ups."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import TKN_BENCH, run_forked
from omegaconf import OmegaConf

from tkn.bench import measure, run
from tkn.bench.cli import compose, main
from tkn.bench.engines import TIMED_ENGINES, TimedEngine, TrainingOptions
from tkn.bench.memory import measure_memory
from tkn.bench.report import cost_figure, speedups_table, timings_table
from tkn.bench.rois import generate_rois, save_rois
from tkn.bench.run import bench
from tkn.bench.speedups import speedups
from tkn.models import build_model

SMALL = (
    "case.input_size=[1,12,12]",
    "batch_sizes=[1,2]",
    "train_batch_sizes=[2]",
    "threads=1",
    "measure.repeats=2",
    "measure.rounds=2",
    "measure.seconds=0",
    "measure.warmup=0",
)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_quiet", lambda: None)


def test_a_whole_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ours = TimedEngine(targeted=True, infer=TIMED_ENGINES["torch-masked"].infer, train=TrainingOptions(), ours=True)
    monkeypatch.setitem(TIMED_ENGINES, "tkn", ours)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    threads = torch.get_num_threads()
    engines = "engines=[torch,torch-channels-last,onnxruntime,torch-masked,tkn]"
    result = bench(compose(*SMALL, engines, "rois.share=0.8"), tmp_path)

    assert torch.get_num_threads() == threads
    assert json.loads((tmp_path / "bench.json").read_text()) == result
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.pdf", "bench.png", "config.yaml"}
    assert OmegaConf.load(tmp_path / "config.yaml").rois.share == [0.8]
    assert result["complete"]
    assert (result["case"], result["threads"]) == ("tdn10_mnist", 1)
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert result["machine"]["cpu"]

    rows = {(row["task"], row["batch"], row["network"], row["engine"]): row for row in result["timings"]}
    dense = ("torch", "torch-channels-last")
    timed = {key for key, row in rows.items() if "seconds" in row}
    assert timed == {
        (task, batch, network, engine)
        for task, batch in (("inference", 1), ("inference", 2), ("training", 2))
        for network, names in (("baseline", dense), ("thinned", dense), ("targeted", ("torch-masked", "tkn")))
        for engine in names
    }
    for key in timed:
        seconds = rows[key]["seconds"]
        assert seconds["n"] >= 2
        assert 0 < seconds["least"] <= seconds["q1"] <= seconds["median"] <= seconds["q3"]
        assert rows[key]["precision"] == "float32"
    failure = "onnxruntime is not installed: pip install .[bench]"
    assert {row["failure"] for key, row in rows.items() if key not in timed} == {failure}

    assert [(row["task"], row["batch"], row["engine"]) for row in result["speedups"]] == [
        ("inference", 1, "tkn"),
        ("inference", 2, "tkn"),
        ("training", 2, "tkn"),
    ]
    output = capsys.readouterr().out
    for text in ("tdn10_mnist: milliseconds", failure, "times faster than the fastest peer", "bench.json"):
        assert text in output


def _row(network: str, engine: str, median: float, macs: int, precision: str = "float32") -> dict[str, Any]:
    seconds = {"n": 5, "median": median, "q1": median * 0.9, "q3": median * 1.1, "least": median * 0.8}
    row = {"task": "inference", "batch": 4, "network": network, "engine": engine, "macs": macs}
    return {**row, "precision": precision, "notes": [], "seconds": seconds}


ROWS = [
    _row("baseline", "torch", 8.0, 1000),
    _row("baseline", "openvino", 6.0, 1000),
    _row("baseline", "openvino-reduced", 3.0, 1000, "reduced"),
    _row("thinned 0.1", "torch", 2.0, 101),
    _row("targeted 0.1", "torch-masked", 9.0, 100),
    _row("targeted 0.1", "tkn", 1.0, 100),
    {"task": "inference", "batch": 4, "network": "thinned 0.1", "engine": "openvino", "macs": 101, "failure": "no"},
]


def test_speedups() -> None:
    (row,) = speedups(ROWS)
    assert (row["network"], row["engine"], row["seconds"], row["macs"]) == ("targeted 0.1", "tkn", 1.0, 100)
    exact, reduced = row["against"]["baseline"]["float32"], row["against"]["baseline"]["any"]
    assert (exact["engine"], exact["speedup"], exact["low"], exact["high"]) == ("openvino", 6.0, 4.909, 7.333)
    assert exact["fewer_macs"] == 10.0
    assert (reduced["engine"], reduced["speedup"]) == ("openvino-reduced", 3.0)
    assert row["against"]["thinned"]["float32"]["speedup"] == 2.0


def test_precisions_are_told_apart() -> None:
    exact, reduced = speedups([*ROWS, _row("targeted 0.1", "tkn-reduced", 0.5, 100, "reduced")])
    assert (exact["engine"], exact["precision"], exact["seconds"]) == ("tkn", "float32", 1.0)
    assert (reduced["engine"], reduced["precision"], reduced["seconds"]) == ("tkn-reduced", "reduced", 0.5)
    assert reduced["against"]["baseline"]["any"]["speedup"] == 6.0
    result = _result() | {"timings": ROWS, "speedups": [exact, reduced]}
    names = list(speedups_table(result).columns[1].cells)
    assert names == ["targeted 0.1, tkn\nfloat32", "targeted 0.1, tkn-reduced\nreduced"]


def test_without_this_engine_there_is_no_speedup() -> None:
    assert speedups([row for row in ROWS if row["engine"] != "tkn"]) == []


def _result() -> dict[str, Any]:
    networks = [("baseline", "baseline", 1000), ("thinned 0.1", "thinned", 101), ("targeted 0.1", "targeted", 100)]
    return {
        "case": "case",
        "threads": 2,
        "machine": {"cpu": "a CPU"},
        "device": {"name": "cpu"},
        "networks": [{"name": name, "kind": kind, "macs": macs} for name, kind, macs in networks],
        "timings": ROWS,
    }


def test_the_plots_ideal_line_goes_through_the_fastest_dense_engine() -> None:
    figure = cost_figure(_result())
    (axis,) = figure.axes
    (ideal,) = [line for line in axis.lines if line.get_linestyle() == "--"]
    (low_macs, high_macs), (low, high) = ideal.get_xdata(), ideal.get_ydata()
    assert (low_macs, high_macs) == pytest.approx((100 / 1e6, 1000 / 1e6))
    assert (low, high) == pytest.approx((0.6 / 4 * 1e6, 6.0 / 4 * 1e6))


def test_the_fastest_engine_of_a_network_is_bold() -> None:
    cells = [str(cell) for column in timings_table(_result()).columns for cell in column.cells]
    assert [cell for cell in cells if "bold" in cell] == [
        "[bold]3000 ±10%[/]",
        "[bold]2000 ±10%[/]",
        "[bold]1000 ±10%[/]",
    ]
    assert "[yellow]failed[/]" in cells


def test_a_gpu_is_named_with_the_type_of_its_numbers() -> None:
    result = _result() | {"device": {"name": "NVIDIA H200"}, "dtype": "bfloat16"}
    title = "case: milliseconds (half the quartiles' distance), NVIDIA H200, bfloat16"
    assert timings_table(result).title == title
    assert cost_figure(result).get_suptitle() == "case on NVIDIA H200, bfloat16"


def test_a_network_of_torchvision(tmp_path: Path) -> None:
    """Dense, thinned and targeted, all in this project's engine too."""
    arguments = (
        "case=torchvision",
        "case.network=mobilenet_v3_small",
        "case.size=64",
        "case.num_outputs=5",
        "case.share=0.7",
    )
    engines = ("batch_sizes=[1]", "train_batch_sizes=[]", "engines=[torch,tkn-dense,torch-masked,tkn]")
    result = bench(compose(*arguments, *SMALL[3:], *engines), tmp_path)
    assert result["case"] == "torchvision_mobilenet_v3_small_64"
    assert [network["kind"] for network in result["networks"]] == ["baseline", "thinned", "targeted"]
    assert result["networks"][2]["share"] == pytest.approx(0.7, abs=0.02)
    timed = {(row["network"], row["engine"]) for row in result["timings"] if "seconds" in row}
    dense = {(network, engine) for network in ("baseline", "thinned") for engine in ("torch", "tkn-dense")}
    assert timed == dense | {("targeted", "torch-masked"), ("targeted", "tkn")}


def test_a_network_of_one_dimension(tmp_path: Path) -> None:
    """Its maps have no channels-last format, so that those engines are left out."""
    arguments = ("case=keywords", *SMALL[3:], "batch_sizes=[1]", "train_batch_sizes=[2]")
    engines = "engines=[torch,torch-channels-last,tkn-dense,torch-masked,torch-masked-channels-last,tkn]"
    result = bench(compose(*arguments, engines), tmp_path)
    assert [network["kind"] for network in result["networks"]] == ["baseline", "thinned", "targeted"]
    assert result["networks"][2]["share"] == pytest.approx(0.27, abs=0.02)
    timed = {(row["task"], row["network"], row["engine"]) for row in result["timings"] if "seconds" in row}
    of_dense = {
        ("inference", network, engine) for network in ("baseline", "thinned") for engine in ("torch", "tkn-dense")
    }
    trained = {("training", network, "torch") for network in ("baseline", "thinned")}
    ours = {(task, "targeted", engine) for task in ("inference", "training") for engine in ("torch-masked", "tkn")}
    assert timed == of_dense | trained | ours


def test_rois_of_a_file_and_of_another_case(tmp_path: Path) -> None:
    model = build_model("tdn10", (1, 12, 12), 10, attention="gaussian")
    generate_rois(model, (1, 12, 12), 0.8, seed=0)
    path = tmp_path / "rois.json"
    save_rois(model, "tdn10", (1, 12, 12), 10, "how", path)
    arguments = (*SMALL[:1], *SMALL[3:], "rois.source=file", f"rois.path={path}")
    arguments = (*arguments, "batch_sizes=[1]", "train_batch_sizes=[]", "engines=[torch-masked]")
    result = bench(compose(*arguments), tmp_path / "out")
    assert result["networks"][2]["rois"] == f"{path}: how"
    assert result["speedups"] == []
    with pytest.raises(
        ValueError, match=r"rois\.json is of input_size=\[1, 12, 12\], the case of input_size=\[1, 13, 13\]"
    ):
        bench(compose(*arguments, "case.input_size=[1,13,13]"), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_busy_machine_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "load_average", lambda: 3.25)
    monkeypatch.setattr(run.OtherLoad, "mean", lambda _self: 1.5)
    arguments = (*SMALL, "batch_sizes=[1]", "train_batch_sizes=[]", "engines=[torch]")
    warnings = "; ".join(bench(compose(*arguments), tmp_path)["warnings"])
    assert "the load average was 3.25 at the start" in warnings
    assert "1.5 CPUs were busy with something else" in warnings


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured on Linux only")
def test_memory(tmp_path: Path) -> None:
    bench_config = compose(*SMALL, "case.input_size=[1,64,64]")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(bench_config, resolve=True))
    measured = measure_memory(tmp_path / "config.yaml", "baseline", "torch", 16)
    # Two maps of 72 channels of 16 images, at the least.
    assert measured["peak_mib"] - measured["before_mib"] == pytest.approx(measured["increase_mib"], abs=0.1)
    assert measured["increase_mib"] > 2 * 16 * 72 * 64 * 64 * 4 / 2**20


def test_the_command(tmp_path: Path) -> None:
    arguments = (*SMALL, "batch_sizes=[1]", "train_batch_sizes=[]", "engines=[torch]")
    done = run_forked(TKN_BENCH, *arguments, folder=tmp_path, HYDRA_FULL_ERROR="0")
    assert done.returncode == 0, done.stderr
    assert "tdn10_mnist: milliseconds" in done.stdout
    (path,) = tmp_path.glob("outputs/bench/*/*/bench.json")
    assert json.loads(path.read_text())["complete"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("case=tdn11_mnist", "tkn-bench: error: unknown case 'tdn11_mnist'; did you mean 'tdn10_mnist'?"),
        ("threads=0", "tkn-bench: error: threads=0 must be null or at least 1"),
    ],
)
def test_wrong_arguments_leave_nothing_behind(wrong_arguments: Callable[..., str], argument: str, message: str) -> None:
    assert wrong_arguments(main, argument) == message
