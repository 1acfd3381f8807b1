"""All figures of a report: drawn, written, captioned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tkn.app.messages import message
from tkn.data import check_data_options, load_data, loader_options
from tkn.data.base import DataSet, is_whole
from tkn.report.figures.animation import save_animation
from tkn.report.figures.attention import SCALE_UNIT, attention_functions
from tkn.report.figures.rois import attention_pages
from tkn.report.figures.samples import data_samples, data_title
from tkn.report.figures.style import Picture, save_print, slug
from tkn.report.figures.tradeoff import tradeoff_pages
from tkn.report.figures.tradeoff_points import Panel, operations_gain, panels, published_operations
from tkn.report.runs.groups import Group, Section
from tkn.report.runs.roi_states import MANY_KERNELS, read_states
from tkn.report.runs.run import Run, short_source
from tkn.report.timing import time_gain


def attention_picture(folder: Path) -> Picture:
    """Figure 2."""
    png, pdf = save_print(attention_functions(), folder, "figure2_attention_functions")
    caption = (
        "Left: the Gaussian (Eq. 2) and Cauchy (Eq. 3) windows along one axis, with the value at the ROI's edge "
        f"(Eq. 15). The window's argument is (x - loc) / (scale_unit scale), with scale_unit {SCALE_UNIT}. "
        "Right: F_x, F_y and their product F_att (Eq. 13) of one kernel at the start (loc 0.5, scale 1), when its ROI "
        "is the whole map."
    )
    alt = "Two bell curves over a gray band that marks the ROI, the Cauchy curve with the heavier tails; six gray maps."
    return Picture("Figure 2: attention functions", caption, alt, png, (pdf,))


def sample_pictures(runs: Iterable[Run], data_dir: Path, folder: Path, notes: list[str]) -> Iterator[Picture]:
    """Figure 3: samples of tlMNIST and of every data set among the runs with a summary; `notes` gets what failed."""
    for name, options in _data_options(runs, data_dir):
        if name == "python":
            notes.append(f"No samples of {options.get('factory')}: a report runs no code of a run's")
            continue
        try:
            data = load_data(name, data_dir, **options)
        except (OSError, ValueError) as error:
            notes.append(f"No samples of {name}: {message(error)}")
            continue
        if name == "tlmnist" and not is_whole(data.source):
            notes.append(f"The samples of tlmnist are made of other digits than the whole MNIST's: {data.source}")
        yield _sample_picture(data, folder)


def _sample_picture(data: DataSet, folder: Path) -> Picture:
    name = data_title(data)
    png, pdf = save_print(data_samples(data), folder, f"figure3_{slug(name)}")
    caption = f"Test images of {name} as the network gets them, evenly spaced over the set. Data: {data.source}."
    if data.name == "tlmnist":
        caption += " The label is the top left digit's; the other three distract."
    alt = f"Fourteen test images of {name} in two rows, each with its label above it."
    return Picture(f"Figure 3: samples of {name}", caption, alt, png, (pdf,))


def _data_options(runs: Iterable[Run], data_dir: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each data set's name and options: those of the first run on it; embedded digits where the run had them.

    Own data are of one set if they are at one place.
    """
    found: dict[tuple[str, Any], dict[str, Any]] = {}
    for run in runs:
        if run.summary is None:
            continue
        name = run.result["data"]
        prefix = "data."
        options = {key.removeprefix(prefix): v for key, v in (run.config or {}).items() if key.startswith(prefix)}
        # Samples are shown as they are: without normalisation, and without a group's, as augmentation in training.
        options = {key: v for key, v in loader_options(options).items() if key != "normalise" and "." not in key}
        if "embedded" in run.result["data_source"]:
            options["source"] = "embedded"
        try:
            check_data_options(name, options)
        except ValueError:  # a configuration of another version
            options = {}
        found.setdefault((name, options.get("path", options.get("factory"))), options)
    here = (data_dir / "MNIST" / "raw").is_dir()
    found.setdefault(("tlmnist", None), {"source": "auto" if here else "embedded"})
    ordered = sorted(found.items(), key=lambda item: (item[0][0] != "tlmnist", item[0][0], str(item[0][1])))
    return [(name, options) for (name, _), options in ordered]


def attention_pictures(sections: Iterable[Section], folder: Path, notes: list[str]) -> Iterator[Picture]:
    """Figure 4: of the run with the lowest seed of each row with target layers, the maps by epoch and an animation."""
    number = 0
    for section in sections:
        for group in section.groups:
            if group.targeted:
                number += 1
                yield from _attention_pictures(section, group, number, folder, notes)


def _attention_pictures(
    section: Section, group: Group, number: int, folder: Path, notes: list[str]
) -> Iterator[Picture]:
    try:
        states = read_states(group.first)
    except ValueError as error:
        notes.append(f"No attention maps of {group.label}: {error}")
        return
    part = "" if section.whole else f" ({short_source(section.source)})"
    title = f"{group.label}, seed {group.seeds[0]}{part}"
    pages = attention_pages(states, title)
    name = f"figure4_{number:02}_{slug(group.label)}"
    for page, figure in enumerate(pages, 1):
        suffix, of_pages = (f"_{page}", f", part {page} of {len(pages)}") if len(pages) > 1 else ("", "")
        png, pdf = save_print(figure, folder, f"{name}{suffix}")
        shown = (
            "For each pixel the share of the layer's kernels whose ROIs cover it"
            if states.kernels > MANY_KERNELS
            else "Each kernel's attention map (white: 1, black: 0) with its ROI's box in orange"
        )
        caption = f"{shown}, a row a target layer, a column an epoch. Run: {group.first.name}."
        if len(states.epochs) == 1:
            caption += " This run recorded no ROIs by epoch: only the checkpoint's are shown."
        what = (
            "Maps of coverage" if states.kernels > MANY_KERNELS else "Mosaics of gray attention maps with orange boxes"
        )
        alt = f"{what}, for {title}."
        yield Picture(f"Figure 4: attention maps of {title}{of_pages}", caption, alt, png, (pdf,))
    if len(states.epochs) > 1:
        path = folder / f"{name}.gif"
        frames = save_animation(states, title, path)
        caption = f"The same ROIs from the start to epoch {states.epochs[-1]}, {frames} frames."
        alt = f"Animation: the orange boxes shrink and move over training, for {title}."
        yield Picture(f"Animation: ROIs of {title}", caption, alt, path)


def tradeoff_pictures(
    sections: Sequence[Section], timings: Mapping[str, Any] | None, report: Path, folder: Path
) -> Iterator[Picture]:
    """Figure 5: error against multiply-adds, and against measured time where there are timings."""
    found = panels(sections, operations_gain, published_operations)
    yield from _tradeoff_pictures(found, "operations", "multiply-adds", "times fewer multiply-adds than dense", folder)
    if timings is not None:
        found = panels(sections, time_gain(timings, report))
        what = f"measured time (batch {timings['batch_size']})"
        yield from _tradeoff_pictures(found, "time", what, "times faster than dense, measured", folder)


def _tradeoff_pictures(found: Sequence[Panel], suffix: str, what: str, xlabel: str, folder: Path) -> Iterator[Picture]:
    figures = tradeoff_pages(found, f"Error against {what}", xlabel)
    for page, figure in enumerate(figures, 1):
        number = f"_{page}" if len(figures) > 1 else ""
        png, pdf = save_print(figure, folder, f"figure5_{suffix}{number}")
        title = f"Figure 5: error against {what}{f', part {page} of {len(figures)}' if number else ''}"
        caption = (
            "A point a row of the tables: the mean over its seeds, with the sample standard deviation if there are two "
            "or more; hollow, what the paper reports of the same rows. The numbers at the points are l2 where it "
            "differs (and beta, where there are many). The front joins the points that no other beats in both, where "
            "each is of several seeds or there are many. Rows of soft windows (clip=false) are left out: their errors "
            "are not of networks that cost so little."
        )
        yield Picture(title, caption, f"{xlabel} on the horizontal axis, error on the vertical one.", png, (pdf,))
