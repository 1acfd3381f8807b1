"""ROIs apart from weights: small JSON files of trained ones, and random ones of a given share of the multiply-adds.

    python -m tkn.bench.rois outputs/.../last.ckpt results/rois/tdn10_mnist.json

writes the file of a run's checkpoint. It holds `model`, `input_size`, `num_outputs`, `attention`, `scale_unit`,
`min_size`, `macs_dense`, `macs_roi`, `trained` (how: a text) and `layers`: by name `map_size`, `loc` and `scale`
([2][C], fractions of the map's side) and `rectangles` ([C] of top, bottom, left, right in pixels, half-open).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tkn.app.files import write_whole
from tkn.app.messages import unknown
from tkn.layers import RoiLayer, require_rectangles, roi_layers
from tkn.macs import count_macs, kernel_macs
from tkn.roi import roi_areas
from tkn.training.records.checkpoint import checkpoint_network

_NETWORK = ("model", "input_size", "num_outputs", "attention", "scale_unit", "min_size")
_TOP = (*_NETWORK, "macs_dense", "macs_roi", "trained", "layers")
_LAYER = ("map_size", "loc", "scale", "rectangles")


def save_rois(
    model: nn.Module, name: str, input_size: tuple[int, ...], num_outputs: int, trained: str, path: Path
) -> None:
    """Write the ROIs of `model`, the network that `build_model` makes of these arguments; `trained`: a text, how.

    loc and scale are rounded to five decimals, or to as many more as keep every rectangle. ValueError if the model has
    no target layer.
    """
    layers = roi_layers(model)
    if not layers:
        raise ValueError(f"model {name} has no target layer, so no ROIs")
    require_rectangles(model, "a file of ROIs has one rectangle for each kernel")
    report = count_macs(model, input_size)
    map_sizes = {row.name: row.map_size for row in report.target_layers}
    first = next(iter(layers.values()))
    least = {side for layer in layers.values() for side in layer.min_size}
    content = {
        "model": name,
        "input_size": list(input_size),
        "num_outputs": num_outputs,
        "attention": first.attention,
        "scale_unit": first.scale_unit,
        "min_size": least.pop() if len(least) == 1 else "kernel",
        "macs_dense": report.total_dense,
        "macs_roi": report.total_roi,
        "trained": trained,
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    entries = []
    for layer_name, layer in layers.items():
        values = _layer_content(layer, map_sizes[layer_name])
        # One line a value: legible, and short differences.
        inner = ",\n".join(
            f"   {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in values.items()
        )
        entries.append(f"  {json.dumps(layer_name)}: {{\n{inner}\n  }}")
    lines.append(' "layers": {\n' + ",\n".join(entries) + "\n }")
    write_whole(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _layer_content(layer: RoiLayer, map_size: tuple[int, ...]) -> dict[str, Any]:
    wanted = layer.rois(map_size)
    loc, scale = layer.loc.detach().clone(), layer.scale.detach().clone()
    try:
        for digits in range(5, 10):  # nine hold a float32
            rounded = [[[round(x, digits) for x in row] for row in values.tolist()] for values in (loc, scale)]
            _put(layer, *rounded)
            if torch.equal(layer.rois(map_size), wanted):
                break
    finally:
        _put(layer, loc, scale)
    return {
        "map_size": list(map_size),
        "loc": rounded[0],
        "scale": rounded[1],
        "rectangles": wanted.flatten(1).tolist(),
    }


def _put(layer: RoiLayer, loc: Tensor | list[list[float]], scale: Tensor | list[list[float]]) -> None:
    with torch.no_grad():
        layer.loc.copy_(torch.as_tensor(loc))
        layer.scale.copy_(torch.as_tensor(scale))


def read_rois(path: Path) -> dict[str, Any]:
    """The content of a ROI file. FileNotFoundError if it is not there, ValueError if it is not one."""
    if not path.is_file():
        raise FileNotFoundError(f"rois.path={path} is not a file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"rois.path={path} is not JSON: {error}") from error
    missing = [key for key in _TOP if not isinstance(content, dict) or key not in content]
    missing += [] if missing else [key for layer in content["layers"].values() for key in _LAYER if key not in layer]
    if missing:
        raise ValueError(f"rois.path={path} is not a file of ROIs: it has no {missing[0]!r}")
    return content


def load_rois(model: nn.Module, path: Path) -> dict[str, Any]:
    """Give the target layers of `model` the loc and scale of a file; returns the file's content.

    ValueError if the file is of other layers, kernels or attention, or if its rectangles do not follow from its loc
    and scale. The model is then left half changed.
    """
    content = read_rois(path)
    layers = roi_layers(model)
    for name in content["layers"]:
        if name not in layers:
            raise ValueError(f"rois.path={path}: {unknown('target layer', name, layers)}")
    for name, layer in layers.items():
        if name not in content["layers"]:
            raise ValueError(f"rois.path={path} has no ROIs of layer {name!r}")
        _load_layer(layer, content["layers"][name], f"rois.path={path}, layer {name!r}")
        for key in ("attention", "scale_unit"):
            if getattr(layer, key) != content[key]:
                raise ValueError(f"rois.path={path} is of {key}={content[key]}, the model of {getattr(layer, key)}")
    return content


def _load_layer(layer: RoiLayer, values: Mapping[str, Any], where: str) -> None:
    kernels = layer.loc.shape[1]
    for key, rows, columns in (("loc", 2, kernels), ("scale", 2, kernels), ("rectangles", kernels, 4)):
        if len(values[key]) != rows or any(len(row) != columns for row in values[key]):
            raise ValueError(f"{where}: {key} must be {rows} rows of {columns} numbers ({kernels} kernels)")
    _put(layer, values["loc"], values["scale"])
    if layer.rois(tuple(values["map_size"])).flatten(1).tolist() != values["rectangles"]:
        raise ValueError(f"{where}: the rectangles do not follow from loc and scale")


def generate_rois(model: nn.Module, input_size: tuple[int, ...], share: float, seed: int) -> None:
    """Give every target layer of `model` random ROIs: all multiply-adds together are `share` of the dense ones.

    Centres scatter about the map's centre and sizes about one common size, as those of trained networks do; the common
    size is found by halving, so the share is met as nearly as whole pixels allow. The same on every machine, whatever
    torch's random state. ValueError if the layers that have no ROI, or the smallest ROIs, alone cost more.
    """
    if not 0 < share <= 1:
        raise ValueError(f"rois.share={share} must lie within (0, 1]")
    layers = roi_layers(model)
    if not layers:
        raise ValueError("the model has no target layer, so no ROIs")
    generator = torch.Generator().manual_seed(seed)
    shapes = {}
    for name, layer in layers.items():
        loc = (0.5 + 0.1 * torch.randn(layer.loc.shape, generator=generator)).clamp(0.3, 0.7)
        spread = torch.exp(0.35 * torch.randn(layer.scale.shape, generator=generator))
        shapes[name] = (loc, spread)

    report = count_macs(model, input_size)
    rows = {row.name: row for row in report.target_layers}
    fixed = report.total_roi - sum(row.macs_roi for row in rows.values())

    def macs(size: float) -> int:
        """Multiply-adds with ROIs of this common size, which the model then has."""
        total = fixed
        for name, layer in layers.items():
            row = rows[name]
            loc, spread = shapes[name]
            _put(layer, loc, (size * spread).clamp(max=1))
            layer.project_(row.map_size)
            total += kernel_macs(layer) * int(roi_areas(layer.rois(row.map_size)).sum())
        return total

    wanted = share * report.total_dense
    low, high = 0.0, 10.0
    least = macs(low)
    # ROIs of whole pixels can't come nearer than this to a share near the least.
    if least > wanted * 1.02:
        raise ValueError(
            f"rois.share={share}: the least that this network can have is {least / report.total_dense:.3g}"
        )
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if macs(middle) < wanted else (low, middle)
    macs(min((low, high), key=lambda size: abs(macs(size) - wanted)))


def describe_training(path: Path, config: Mapping[str, Any]) -> str:
    """How a checkpoint came about: the arguments of its run, and the error of the summary beside it if there is one."""
    command = f"tkn-run experiment={config['experiment']}" if config["experiment"] else "tkn-run"
    parts = [f"model={config['model']['name']} data={config['data']['name']} attention={config['attention']['name']}"]
    penalty = config["penalty"]
    shown = ("share", "macs", "reach") if "reach" in penalty else ("l2", "beta")
    parts += ["penalty=budget"] if "reach" in penalty else []
    parts += [f"penalty.{key}={penalty[key]:g}" for key in shown if penalty[key] is not None]
    text = f"{command} {' '.join(parts)} seed={config['seed']}; {path.stem}"
    summary = path.with_name("summary.json")
    if summary.is_file():
        results = json.loads(summary.read_text(encoding="utf-8"))
        text += f" of {results['epochs']} epochs on {results['data_source']}"
        text += "".join(f"; {key} {results[key]:g}" for key in ("error", "mse", "mae") if key in results)
    return text


def main(arguments: list[str] | None = None) -> None:
    """Write the ROI file of a checkpoint; exit status 1 and one line on stderr if it fails."""
    parser = argparse.ArgumentParser(prog="python -m tkn.bench.rois", description="Write the ROIs of a checkpoint.")
    parser.add_argument("checkpoint", type=Path, help="last.ckpt or best.ckpt of a run")
    parser.add_argument("rois", type=Path, help="the JSON file to write")
    parser.add_argument("--trained", help="how the network was trained, instead of what the checkpoint says")
    parsed = parser.parse_args(arguments)
    try:
        model, identity = checkpoint_network(parsed.checkpoint)
        trained = parsed.trained or describe_training(parsed.checkpoint, identity["config"])
        parsed.rois.parent.mkdir(parents=True, exist_ok=True)
        input_size, num_outputs = tuple(identity["input_size"]), identity["num_outputs"]
        save_rois(model, identity["model"], input_size, num_outputs, trained, parsed.rois)
    except (OSError, ValueError) as error:
        sys.exit(f"tkn.bench.rois: error: {error}")


if __name__ == "__main__":
    main()
