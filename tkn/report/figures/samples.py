"""Figure 3: samples of a data set as the network gets them, with their labels."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from tkn.data.base import DataSet, is_own, is_whole
from tkn.report.figures.style import PAGE, print_style, wrapped
from tkn.report.runs.run import short_source

_ROWS, _COLUMNS = 2, 7
_NAMES = {"mnist": "MNIST", "tlmnist": "tlMNIST", "svhn": "SVHN", "gtsrb": "GTSRB", "pain": "UNBC-McMaster Pain"}


def data_title(data: DataSet) -> str:
    """What captions call it: its name, or the place of a user's own."""
    return data.source.removeprefix("own: ").split(",")[0] if is_own(data.source) else data.name


def data_samples(data: DataSet) -> Figure:
    """Test images, evenly spaced over the set, each with its class or intensity above it."""
    chosen = data.test.evenly(_ROWS * _COLUMNS)
    own = is_own(data.source)
    with torch.no_grad():
        images = data.inputs(chosen).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    with print_style():
        height = 0.45 + _ROWS * (PAGE / _COLUMNS + 0.08)
        figure = Figure(figsize=(PAGE, height), layout="constrained")
        axes = figure.subplots(_ROWS, _COLUMNS, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, image, target in zip(axes.flat, images, chosen.targets.flatten().tolist(), strict=False):
            gray = image.shape[2] == 1
            axis.imshow(image[..., 0] if gray else image, cmap="gray" if gray else None, vmin=0, vmax=1)
            named = own and data.classes
            axis.set_title(data.classes[int(target)] if named else f"{target:g}", pad=3)
        what = "class" if data.task == "classification" else "number" if own else "pain intensity"
        name = _NAMES.get(data.name, data_title(data))
        part = "" if own or is_whole(data.source) else f" ({short_source(data.source)})"
        figure.suptitle(wrapped(f"{name}{part}: test images, each with its {what}"))
    return figure
