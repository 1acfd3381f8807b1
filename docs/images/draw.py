"""Draws the documents' pictures of results and timings from the recorded files: python docs/images/draw.py

In a checkout, of results/ and benchmarks/. A network whose error or time is not recorded is left out.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tkn.drawing.figures import COLOURS
from tkn.report import figure4, figure5
from tkn.report.figures.rois import attention_pages
from tkn.report.figures.style import PAGE, plain_axis, print_style, save_print
from tkn.report.figures.tradeoff import tradeoff_figure
from tkn.report.figures.tradeoff_points import operations_gain, panels, published_operations
from tkn.report.runs.collect import collect
from tkn.report.runs.groups import Group, Statistic, sections
from tkn.report.runs.roi_states import read_states

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
BENCHMARKS = ROOT / "benchmarks" / "epyc_2_cores"

#: Picture -> (the run whose ROIs it shows, its title).
ROIS = {
    "results_tdn10_tlmnist_rois": ("table3_tdn10_cauchy/seed0", "TDN10 on tlMNIST"),
    "results_tdn10_rois": ("table2_tdn10_cauchy/seed0", "TDN10 on MNIST"),
    "results_tkn6_tlmnist_rois": ("table3_tkn6_cauchy_beta4/seed0", "TKN6 on tlMNIST, β = 4"),
    "results_tstn_gtsrb_rois": ("table5_tstn_cauchy/seed0", "TSTN on GTSRB, the paper's recipe"),
    "results_tstn_gtsrb_modern_rois": ("better/tstn_gtsrb_held_out/seed0", "TSTN on GTSRB, this project's recipe"),
}
#: A panel: its title, the benchmark's folder, the rows of the dense network and of the targeted one that was timed.
TIMES = (
    ("CNN6 on tlMNIST", "trained_tkn6_tlmnist", "table3_cnn6", "table3_tkn6_cauchy_beta4"),
    ("DN10 on tlMNIST", "trained_tdn10_tlmnist", "table3_dn10", "table3_tdn10_cauchy"),
    ("CNN6 on MNIST", "trained_tkn6_mnist", "table2_cnn6", "table2_tkn6_cauchy"),
    ("DN10 on MNIST", "trained_tdn10_mnist", "table2_dn10", "table2_tdn10_cauchy"),
)
BATCH = 128
KINDS = {
    "baseline": ("dense", "black", "*", 11),
    "thinned": ("thin", COLOURS[1], "s", 6),
    "targeted": ("targeted", COLOURS[0], "o", 7),
}
#: Thin networks have a few multiply-adds more or less than the targeted one.
NEAR = 0.05


@dataclass(frozen=True)
class Timed:
    """A network's error, None where it is not recorded, and the milliseconds of a batch by the fastest engine."""

    kind: str
    error: Statistic | None
    milliseconds: Mapping[str, float]


def rows_of(folders: Iterable[Path]) -> list[Group]:
    """Recorded runs on whole data, those that differ in the seed alone as one."""
    runs, _ = collect([folder for folder in folders if folder.is_dir()])
    return [group for section in sections(runs) if section.whole for group in section.groups]


def networks(bench: Path, dense: str, targeted: str) -> list[Timed]:
    """Dense, thin and targeted, of one benchmark."""
    result = json.loads((bench / "bench.json").read_text(encoding="utf-8"))
    macs = {network["kind"]: network["macs"] for network in result["networks"]}
    groups = {"baseline": rows_of([RESULTS / dense]), "targeted": rows_of([RESULTS / targeted])}
    config = groups["baseline"][0].common
    groups["thinned"] = [
        group
        for group in rows_of([RESULTS])
        if (group.first.config or {}).get("model.thin") is not None
        and (group.common["model"], group.common["data"]) == (config["model"], config["data"])
        and abs(group.common["macs_roi"] / macs["thinned"] - 1) < NEAR
    ]
    found = []
    for kind in KINDS:
        # Of rows in several precisions that of the most seeds.
        group = max(groups[kind], key=lambda group: len(group.runs), default=None)
        error = group.statistic("error") if group is not None else None
        found.append(Timed(kind, error, fastest(result["timings"], kind)))
    return found


def fastest(timings: Iterable[Mapping[str, Any]], kind: str) -> dict[str, float]:
    """The milliseconds of a batch by the fastest engine, in float32 and in bfloat16."""
    times: dict[str, list[float]] = {}
    for row in timings:
        if row["network"] == kind and row["task"] == "inference" and row["batch"] == BATCH and "seconds" in row:
            precision = "float32" if row["precision"] == "float32" else "bfloat16"
            times.setdefault(precision, []).append(1000 * row["seconds"]["median"])
    return {precision: min(values) for precision, values in times.items()}


def _spread_by_ratio(axis: Axes) -> None:
    """A logarithmic axis of x, with numbers as they are."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def error_against_time() -> Figure:
    """A panel for each network and data set."""
    timed = [(title, BENCHMARKS / bench, *rows) for title, bench, *rows in TIMES]
    panels = [(title, networks(bench, *rows)) for title, bench, *rows in timed if (bench / "bench.json").is_file()]
    with print_style():
        rows = ceil(len(panels) / 2)
        figure = Figure(figsize=(PAGE, 2.4 * rows + 0.4), layout="constrained")
        for axis, (title, shown) in zip(figure.subplots(rows, 2, squeeze=False).flat, panels, strict=False):
            for network in shown:
                _draw(axis, network)
            _spread_by_ratio(axis)
            axis.margins(0.15, 0.25)
            axis.set_title(title)
            axis.set_xlabel(f"milliseconds, {BATCH} images")
            axis.set_ylabel("test error (%)")
            plain_axis(axis)
        handles = [
            Line2D([], [], linestyle="", color=colour, marker=marker, markersize=size, label=label)
            for label, colour, marker, size in KINDS.values()
        ]
        hollow = Line2D([], [], linestyle="", color="0.3", marker="o", mfc="none", label="hollow: in bfloat16")
        untold = any(network.error is None for _title, shown in panels for network in shown)
        line = Line2D([], [], color=KINDS["thinned"][1], linestyle=":", label="thin: error not recorded yet")
        figure.legend(handles=[*handles, hollow, *[line] * untold], loc="outside lower center", ncols=5, frameon=False)
    return figure


def _draw(axis: Axes, network: Timed) -> None:
    _label, colour, marker, size = KINDS[network.kind]
    for precision, milliseconds in network.milliseconds.items():
        if network.error is None:
            axis.axvline(milliseconds, color=colour, linestyle=":", linewidth=1.2 if precision == "float32" else 0.7)
            continue
        fill = colour if precision == "float32" else "none"
        axis.errorbar(
            milliseconds,
            network.error.mean,
            yerr=network.error.deviation,
            color=colour,
            marker=marker,
            markersize=size,
            mfc=fill,
            linewidth=0.9,
            capsize=2,
        )


def steps() -> Figure:
    """TKN6's training steps by its multiply-adds, and the dense network's."""
    with (RESULTS / "steps_tkn6" / "metrics.csv").open(encoding="utf-8") as file:
        epochs = [(int(row["macs_roi"]) / 1e6, float(row["step_seconds"])) for row in csv.DictReader(file)]
    # An epoch's steps are of the ROIs before its end.
    starts = [epochs[0][0], *(macs for macs, _ in epochs[:-1])]
    with print_style():
        figure = Figure(figsize=(0.7 * PAGE, 2.9), layout="constrained")
        axis = figure.subplots()
        axis.plot(starts, [seconds for _, seconds in epochs], "o-", color=COLOURS[0], label="TKN6, epoch by epoch")
        for fourier, style, label in (
            ("false", "--", "CNN6, tap by tap"),
            ("true", ":", "CNN6, by frequencies (the default)"),
        ):
            axis.axhline(dense_step(fourier), color="black", linestyle=style, linewidth=1, label=label)
        axis.set_xlabel("multiply-adds of an image (millions)")
        axis.set_ylabel("seconds a step, batch 128")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
        plain_axis(axis)
    return figure


def dense_step(fourier: str) -> float:
    """Seconds of CNN6's step in float32: the mean of the medians of its second and third epoch."""
    with (BENCHMARKS / "training_steps_fourier.csv").open(encoding="utf-8") as file:
        (row,) = (
            row
            for row in csv.DictReader(file)
            if (row["model"], row["precision"], row["fourier"]) == ("cnn6", "32-true", fourier)
        )
    return (float(row["step_ms_epoch2"]) + float(row["step_ms_epoch3"])) / 2000


def tradeoff() -> Figure:
    """Tables 2 and 3, beside the paper's."""
    groups = sections(collect(sorted(RESULTS.glob("table[23]_*")))[0])
    found = panels(groups, operations_gain, published_operations)
    return tradeoff_figure(found, "Error against multiply-adds", "times fewer multiply-adds than dense")


def rois(run: str, title: str) -> Figure:
    """The first page of a run's Figure 4."""
    (found,), _ = collect([RESULTS / run])
    return attention_pages(read_states(found), title)[0]


def figure5_picture(found: Mapping[int, Sequence[Group]]) -> Figure:
    """Error against relative speed-up, a line for each beta."""
    with print_style():
        figure = Figure(figsize=(0.7 * PAGE, 2.9), layout="constrained")
        axis = figure.subplots()
        for (beta, groups), colour in zip(found.items(), COLOURS, strict=False):
            if not groups:
                continue
            errors = [group.statistic("error") for group in groups]
            axis.errorbar(
                [group.times_fewer for group in groups],
                [error.mean for error in errors if error],
                yerr=[error.deviation or 0 for error in errors if error],
                color=colour,
                marker="o",
                markersize=4,
                linewidth=1,
                capsize=2,
                label=f"β = {beta}",
            )
        _spread_by_ratio(axis)
        axis.set_xlabel("times fewer multiply-adds than CNN6")
        axis.set_ylabel("test error (%)")
        axis.legend(frameon=False)
        plain_axis(axis)
    return figure


def papers_figures() -> dict[str, Figure]:
    """Figures 4 and 5, as far as their runs are recorded."""
    maps, points = figure4.states(RESULTS), figure5.lines(RESULTS)
    return {
        **({"results_figure4": figure4.figure(maps)} if maps else {}),
        **({"results_figure5": figure5_picture(points)} if points else {}),
    }


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    figures = {
        "error_against_time": error_against_time(),
        "results_tradeoff": tradeoff(),
        "tkn6_steps": steps(),
        **papers_figures(),
        **{name: rois(run, title) for name, (run, title) in ROIS.items()},
    }
    for name, figure in figures.items():
        _png, pdf = save_print(figure, folder, name)
        pdf.unlink()


if __name__ == "__main__":
    main()
