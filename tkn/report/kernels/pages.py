"""A page for each row's run: what its kernels look at, and what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from tkn.adaptive import AdaptiveConv2d
from tkn.app.files import csv_text, write_whole
from tkn.report.document import Document, html
from tkn.report.figures.style import Picture, save_print, slug
from tkn.report.kernels.figures import coverage_figure, kernels_figure
from tkn.report.kernels.look import LayerLook, Look, look_at
from tkn.report.kernels.receptive_field import box_around
from tkn.report.kernels.silencing import CANDIDATES, importance
from tkn.report.runs.groups import Section
from tkn.report.runs.roi_states import layer_title
from tkn.report.tables.sheets import Column, Sheet
from tkn.several import MixtureConv2d

#: Kernels that are shown of a layer.
_SHOWN = 3
_PREFIX = "kernels_"


def kernel_pages(
    sections: Iterable[Section], folder: Path, data_dir: Path, count: int, console: Console, notes: list[str]
) -> dict[str, list[Path]]:
    """Write the page of the lowest seed of each row with target layers, measured on `count` test images.

    Returns the files of each page by its title, the page first; `notes` gets what could not be looked at. Pages of an
    earlier report are removed.
    """
    written: dict[str, list[Path]] = {}
    groups = [group for section in sections for group in section.groups if group.targeted]
    if not groups:
        notes.append("--kernels: no counted run has target layers")
    for number, group in enumerate(groups, 1):
        title = f"{group.label}, seed {group.seeds[0]}"
        try:
            with _progress(console, f"kernels of {group.first.name}") as say:
                look = look_at(group.first, data_dir, count, say)
        except ValueError as error:
            notes.append(f"No kernels of {group.first.name}: {error}")
            continue
        written[f"Kernels of {title}"] = _write_page(look, title, f"{_PREFIX}{number:02}_{slug(group.label)}", folder)
    kept = {path for paths in written.values() for path in paths}
    for where in (folder, folder / "figures"):
        for path in where.glob(f"{_PREFIX}[0-9][0-9]_*"):
            if path.suffix in (".html", ".csv", ".png", ".pdf") and path not in kept:
                path.unlink()
    return written


@contextmanager
def _progress(console: Console, what: str) -> Iterator[Callable[[str], None]]:
    """Within the context what is said stands on the console's last line; where that is no terminal, on lines of its
    own."""
    with console.status(escape(what), spinner="line") as status:

        def say(text: str) -> None:
            if console.is_terminal:
                status.update(escape(f"{what}: {text}"))
            else:
                console.print(f"{what}: {text}", markup=False, highlight=False, soft_wrap=True)

        yield say


def _write_page(look: Look, title: str, name: str, folder: Path) -> list[Path]:
    figures = folder / "figures"
    shown = {layer: found.important()[:_SHOWN] for layer, found in look.layers.items()}
    pictures = list(_pictures(look, title, shown, name, figures))
    sheets = [_importance_sheet(look, shown, name), *_faces_sheets(look, shown)]
    links = (("The report", "report.html"),)
    document = Document(list(_lead(look)), sheets, pictures, list(_notes(look)), f"Kernels of {title}", links)
    page, table = folder / f"{name}.html", folder / f"{name}.csv"
    write_whole(page, html(document))
    write_whole(table, csv_text(list(_csv_rows(look))))
    return [page, table, *(path for picture in pictures for path in (picture.path, *picture.others))]


def _lead(look: Look) -> Iterator[str]:
    count, whole = len(look.images), len(look.data.test)
    images = f"all {count:,} test images" if count == whole else f"{count:,} test images, evenly among {whole:,}"
    yield f"Run {look.run.name}. Data: {look.data.source}. Measured with the run's checkpoint on {images}."
    if look.data.task == "classification":
        yield f"One image more or less is {100 / count:.2g} percentage points of error."
    moving = any(isinstance(found.layer, AdaptiveConv2d) for found in look.layers.values())
    first = "where on the layer's map its ROI lies" if moving else "its window with the ROI, on the layer's map"
    given = ", where the ROI lies in this image," if moving else ""
    yield (
        "The pictures of a layer show a kernel a row: how much the test error"
        f"{' (in percentage points)' if look.data.task == 'classification' else ''} rises without it; {first}; and the "
        "test images with the largest responses (convolution times window) inside the ROI. What lies outside of the "
        f"orange box on an image cannot{given} change a response inside the ROI; what lies outside of the blue box "
        f"cannot{given} change the largest one."
    )


def _notes(look: Look) -> Iterator[str]:
    """What is otherwise in layers of other kinds than one rectangle a kernel, and what is not shown."""
    for name, why in look.left_out.items():
        yield f"{layer_title(name)} is not shown: {why}."
    layers: dict[str, list[str]] = {}
    for name, found in look.layers.items():
        if about := _about(found, bool(look.areas)):
            layers.setdefault(about, []).append(layer_title(name))
    for about, titles in layers.items():
        yield f"{', '.join(titles)}: {about}"


def _about(found: LayerLook, faces: bool) -> str:
    """What is to be known of a layer, nothing if each of its kernels has one rectangle."""
    if found.parts > 1:
        return (
            f"PartsConv2d, whose output channels are sums of {found.parts} parts: kernels with a window each. They are "
            "shown and silenced one by one; 5.1 is part 1 of channel 5."
        )
    if isinstance(found.layer, MixtureConv2d):
        combined = {"max": "maximum", "sum": "sum"}[found.layer.combine]
        return (
            f"MixtureConv2d. A kernel's window is the {combined} of {found.layer.windows}, its ROI the union of their "
            "rectangles. Each rectangle has an orange box; the coverage counts once what several of a kernel's hold."
        )
    if isinstance(found.layer, AdaptiveConv2d):
        return (
            "AdaptiveConv2d, whose ROIs follow the image. Responses are looked for inside each image's own ROI, whose "
            "receptive field is the orange box on it. The coverage is the mean over the images, and the first picture "
            "of a row shows in what share of them a pixel is in the ROI. Tables have the ROI in the image of the "
            "largest response. Where a ROI lies depends on all of the layer's input: the receptive fields leave that "
            "out, and those of later layers take its ROIs as whole maps."
            + (" Shares on the face are of the windows that no image has moved." if faces else "")
        )
    return ""


def _pictures(look: Look, title: str, shown: Mapping[str, Sequence[int]], name: str, folder: Path) -> Iterator[Picture]:
    png, pdf = save_print(coverage_figure(look, title), folder, f"{name}_coverage")
    caption = (
        "For each pixel of a target layer's map the number of its kernels whose ROI holds it: black is none, the "
        "brightest the most that a pixel of the layer has, which is the bar's upper end."
    )
    yield Picture("Coverage", caption, "Small maps, a layer each, bright where many ROIs lie.", png, (pdf,))
    for layer, kernels in shown.items():
        found = look.layers[layer]
        if not kernels:
            continue
        labels = [
            f"kernel {found.label(kernel)}\n{_error_name(look)} {_signed(found.rises[kernel].error)}"
            for kernel in kernels
        ]
        figure = kernels_figure(look, layer, kernels, labels)
        png, pdf = save_print(figure, folder, _picture_name(look, name, layer))
        shown_title = layer_title(layer)
        caption = (
            f"The kernels of {shown_title} that cost most when silenced. Orange: the receptive field of the ROI; blue: "
            "that of the largest response. Above each image its label and that response."
        )
        alt = f"Rows of test images with an orange and a blue box each, a row a kernel of {shown_title}."
        yield Picture(shown_title[0].upper() + shown_title[1:], caption, alt, png, (pdf,))


def _picture_name(look: Look, name: str, layer: str) -> str:
    """Of the figure of a layer's kernels, on the page `name`."""
    return f"{name}_layer{list(look.layers).index(layer) + 1:02}"


def _importance_sheet(look: Look, shown: Mapping[str, Sequence[int]], name: str) -> Sheet:
    columns = (
        *(Column("layer", right=False), Column("kernel"), Column(f"{_error_name(look)} rises by")),
        *(Column("loss rises by"), Column("largest response"), Column("ROI"), Column("receptive field of the ROI")),
    )
    kernels = [(layer, kernel) for layer, kernels in shown.items() for kernel in kernels]
    kernels.sort(key=lambda each: importance(look.layers[each[0]].rises[each[1]]))
    rows = []
    for layer, kernel in kernels:
        found = look.layers[layer]
        rise = found.rises[kernel]
        rows.append(
            (
                *(layer_title(layer), found.label(kernel), f"{_signed(rise.error)}{_unit(look)}", _signed(rise.loss)),
                f"{float(found.responses.values[0, kernel]):.3g}",
                " and ".join(_box(box) for box in found.responses.rois[0, kernel].tolist()),
                " and ".join(_box(field.tolist()) for field in found.roi_fields(0, kernel)),
            )
        )
    note = (
        f"Of each layer the {_SHOWN} kernels that cost most when their output channel is made zero after the target "
        f"layer, one at a time; of layers of more than {CANDIDATES} kernels those {CANDIDATES} are tried whose output "
        "times the loss's gradient is largest. The most important of all layers come first; a layer's name leads to "
        "its pictures. Boxes are rows by columns, from the first pixel to the last: ROIs on the layer's map, receptive "
        "fields on the image. All kernels are in the CSV file beside this page."
    )
    links = {layer_title(layer): f"#{_picture_name(look, name, layer)}" for layer, _kernel in kernels}
    return Sheet("The most important kernels", note, columns, tuple(rows), links)


def _faces_sheets(look: Look, shown: Mapping[str, Sequence[int]]) -> Iterator[Sheet]:
    """On faces: where the kernels sit."""
    if not look.areas:
        return
    columns = (Column("layer", right=False), Column("kernel", right=False), *map(Column, look.areas))
    rows = [("", "share of the image", *map(_percent, look.areas.values()))]
    for layer, kernels in shown.items():
        found = look.layers[layer]
        means = (_percent(float(shares.mean())) for shares in found.faces.values())
        rows.append((layer_title(layer), f"mean of {found.kernels}", *means))
        for kernel in kernels:
            shares = (_percent(float(each[kernel])) for each in found.faces.values())
            rows.append((layer_title(layer), found.label(kernel), *shares))
    note = (
        "The share of a window's mass within its ROI that lies inside the parts of the reference face, which all faces "
        "are warped to: the convex hulls of its landmarks. The first row is what a window would have that is the same "
        "everywhere."
    )
    yield Sheet("Where on the face", note, columns, tuple(rows))


def _csv_rows(look: Look) -> Iterator[dict[str, object]]:
    for layer, found in look.layers.items():
        for kernel in range(found.kernels):
            rectangles, fields = found.responses.rois[0, kernel], found.roi_fields(0, kernel)
            boxes = {"roi": box_around(rectangles).tolist(), "field": box_around(torch.stack(fields)).tolist()}
            edges = {
                f"{name}_{edge}": value
                for name, box in boxes.items()
                for edge, value in zip(("top", "bottom", "left", "right"), [*box[0], *box[1]], strict=True)
            }
            several = {"rois": " and ".join(map(_box, rectangles.tolist()))} if len(rectangles) > 1 else {}
            rise = found.rises.get(kernel)
            yield {
                **{"layer": layer, "kernel": found.label(kernel), **edges, **several},
                **{"error_rise": rise and rise.error, "loss_rise": rise and rise.loss},
                "largest_response": float(found.responses.values[0, kernel]),
                **{name: float(shares[kernel]) for name, shares in found.faces.items()},
            }


def _box(edges: Sequence[Sequence[int]]) -> str:
    (top, bottom), (left, right) = edges
    if top == bottom or left == right:
        return "nothing"
    return f"{top}-{bottom - 1} x {left}-{right - 1}"


def _signed(value: float) -> str:
    return f"{value:+.3g}"


def _error_name(look: Look) -> str:
    return "error" if look.data.task == "classification" else "MSE"


def _unit(look: Look) -> str:
    return " points" if look.data.task == "classification" else ""


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
