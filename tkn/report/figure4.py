"""Figure 4: where the kernels of TDN10's target layers look, on MNIST and on tlMNIST."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from tkn.drawing.figures import draw_mosaic
from tkn.report.figures.style import PAGE, print_style
from tkn.report.runs.collect import collect
from tkn.report.runs.roi_states import RoiStates, layer_title, read_states

#: By the paper's letters the experiment, and what it trained.
RUNS = {
    "b": ("table2_tdn10_cauchy", "MNIST, l2 = 1e-4, β = 4"),
    "c": ("figure4_c", "tlMNIST, l2 = 2e-4, β = 1"),
    "d": ("table3_tdn10_cauchy", "tlMNIST, l2 = 1e-4, β = 2"),
    "e": ("figure4_e", "tlMNIST, l2 = 1e-4, β = 4"),
}


def states(results: Path) -> dict[str, RoiStates]:
    """Of the runs that are there, the first seed's."""
    found = {}
    for letter, (experiment, _) in RUNS.items():
        folder = results / experiment
        runs = [run for run in collect([folder])[0] if run.state == "finished"] if folder.is_dir() else []
        if runs:
            found[letter] = read_states(min(runs, key=lambda run: run.result["seed"]))
    return found


def figure(found: dict[str, RoiStates]) -> Figure:
    """A row for each run that is there, (a) the initialisation first, and a column for each target layer."""
    first = next(iter(found.values()))
    names = list(first.layers)
    rows = {"a": ("initialisation", first, 0)}
    rows |= {letter: (RUNS[letter][1], state, len(state.epochs) - 1) for letter, state in found.items()}
    with print_style():
        figure = Figure(figsize=(PAGE, 0.75 * len(rows) + 0.3), layout="constrained")
        axes = figure.subplots(len(rows), len(names), squeeze=False)
        for row, (letter, (what, state, index)) in zip(axes, rows.items(), strict=True):
            for axis, name in zip(row, names, strict=True):
                image = draw_mosaic(axis, state.mosaic(name, index), linewidth=0.5)
            said = "\n".join([f"({letter})", *what.split(", ")])
            row[0].set_ylabel(said, rotation=0, ha="right", va="center", fontsize=7)
        for axis, name in zip(axes[0], names, strict=True):
            axis.set_title(layer_title(name), fontsize=7)
        figure.colorbar(image, ax=list(axes.flat), shrink=0.5, aspect=30, pad=0.02).set_label("attention")
    return figure
