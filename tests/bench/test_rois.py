"""ROI files give back what they were written of, and refuse what they are not; generated ROIs have their share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import tkn
from tkn import build_model, count_macs
from tkn.bench.rois import describe_training, generate_rois, load_rois, main, read_rois, save_rois
from tkn.cli import compose
from tkn.layers import roi_layers
from tkn.training.networks import architecture_of
from tkn.training.records.checkpoint import identify

ROOT = Path(__file__).parents[2]

SIZE = (1, 12, 12)


def _model(name: str = "tdn10", **arguments: Any) -> nn.Module:
    return build_model(name, SIZE, 10, **arguments)


def _rectangles(model: nn.Module) -> list[Any]:
    sizes = {row.name: row.map_size for row in count_macs(model, SIZE).target_layers}
    return [layer.rois(sizes[name]).tolist() for name, layer in roi_layers(model).items()]


def test_a_file_gives_the_same_rectangles(tmp_path: Path) -> None:
    model = _model()
    generate_rois(model, SIZE, 0.5, seed=3)
    before = [parameter.clone() for parameter in model.parameters()]
    save_rois(model, "tdn10", SIZE, 10, "not trained", tmp_path / "rois.json")
    assert all(map(torch.equal, before, model.parameters()))

    content = json.loads((tmp_path / "rois.json").read_text())
    assert {key: content[key] for key in ("model", "input_size", "num_outputs", "attention", "min_size")} == {
        "model": "tdn10",
        "input_size": list(SIZE),
        "num_outputs": 10,
        "attention": "cauchy",
        "min_size": 3,
    }
    report = count_macs(model, SIZE)
    assert (content["macs_dense"], content["macs_roi"]) == (report.total_dense, report.total_roi)
    other = _model()
    assert load_rois(other, tmp_path / "rois.json") == content
    assert _rectangles(other) == _rectangles(model)


@pytest.mark.parametrize("path", sorted((ROOT / "results" / "rois").glob("*.json")), ids=lambda path: path.stem)
def test_the_recorded_rois_are_those_of_their_network(path: Path) -> None:
    content = read_rois(path)
    input_size = tuple(content["input_size"])
    options = {key: content[key] for key in ("attention", "scale_unit", "min_size")}
    model = build_model(content["model"], input_size, content["num_outputs"], **options)
    load_rois(model, path)
    assert count_macs(model, input_size).total_roi == content["macs_roi"]


def test_rounding_keeps_an_edge_that_falls_on_a_pixel(tmp_path: Path) -> None:
    model = _model()
    layer = next(iter(roi_layers(model).values()))
    with torch.no_grad():  # five decimals alone would move the rows' edges off the centres of pixels
        layer.loc[0] = 0.5 + torch.arange(12) * 4e-7
        layer.scale[0] = (3.5 / 12 + torch.arange(12) * 4e-7) * 2**0.5
    save_rois(model, "tdn10", SIZE, 10, "", tmp_path / "rois.json")
    other = _model()
    load_rois(other, tmp_path / "rois.json")
    assert _rectangles(other) == _rectangles(model)


def _broken(content: dict[str, Any], kind: str) -> tuple[dict[str, Any], nn.Module]:
    model = _model()
    name = next(iter(content["layers"]))
    layer = content["layers"][name]
    if kind == "rectangle":
        layer["rectangles"][0][0] += 1
    elif kind == "kernels":
        layer["loc"][1].pop()
    elif kind == "missing":
        del layer["scale"]
    elif kind == "no layer":
        del content["layers"][name]
    elif kind == "unknown layer":
        content["layers"]["block9.conv1"] = layer
    elif kind == "attention":
        model = _model(attention="gaussian")
    return content, model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("rectangle", r"layer 'block1\.0\.layers\.conv1': the rectangles do not follow"),
        ("kernels", r"loc must be 2 rows of 12 numbers"),
        ("missing", r"it has no 'scale'"),
        ("no layer", r"has no ROIs of layer 'block1\.0\.layers\.conv1'"),
        ("unknown layer", r"unknown target layer 'block9\.conv1'"),
        ("attention", r"is of attention=cauchy, the model of gaussian"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path: Path, kind: str, message: str) -> None:
    path = tmp_path / "rois.json"
    save_rois(_model(), "tdn10", SIZE, 10, "", path)
    content, model = _broken(json.loads(path.read_text()), kind)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as refused:
        load_rois(model, path)
    assert str(path) in str(refused.value)


def test_what_is_no_file_of_rois_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.json is not a file"):
        read_rois(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("no")
    with pytest.raises(ValueError, match=r"text\.json is not JSON"):
        read_rois(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"it has no 'model'"):
        read_rois(tmp_path / "list.json")
    with pytest.raises(ValueError, match="model dn10 has no target layer"):
        save_rois(_model("dn10"), "dn10", SIZE, 10, "", tmp_path / "x.json")


@pytest.mark.parametrize(("name", "share"), [("tkn6", 0.45), ("tdn10", 0.55), ("tdn10", 1.0)])
def test_generated_rois_have_their_share(name: str, share: float) -> None:
    model, again = _model(name), _model(name)
    generate_rois(model, SIZE, share, seed=0)
    torch.manual_seed(1)
    generate_rois(again, SIZE, share, seed=0)
    assert _rectangles(model) == _rectangles(again)
    report = count_macs(model, SIZE)
    assert report.total_roi / report.total_dense == pytest.approx(share, rel=0.02)
    for rows, columns in (roi for rois in _rectangles(model) for roi in rois):
        assert min(rows[1] - rows[0], columns[1] - columns[0]) >= 3


def test_the_share_is_of_the_dense_network() -> None:
    for options in ({"windows": 2, "combine": "parts"}, {"adaptive": True}):
        model = tkn.build_model("tdn10", SIZE, 10, **options)
        generate_rois(model, SIZE, 0.8, seed=0)
        report = count_macs(model, SIZE)
        assert report.total_roi / report.total_dense == pytest.approx(0.8, rel=0.02)


def test_another_seed_gives_other_rois() -> None:
    model, other = _model(), _model()
    generate_rois(model, SIZE, 0.55, seed=0)
    generate_rois(other, SIZE, 0.55, seed=1)
    assert _rectangles(model) != _rectangles(other)


def test_a_share_out_of_reach_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rois\.share=0\.1: the least that this network can have is 0\.\d+"):
        generate_rois(_model(), SIZE, 0.1, seed=0)
    with pytest.raises(ValueError, match=r"rois\.share=0 must lie"):
        generate_rois(_model(), SIZE, 0, seed=0)


def test_the_file_of_a_checkpoint(tmp_path: Path) -> None:
    model = _model()
    generate_rois(model, SIZE, 0.6, seed=0)
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    config = compose("model=tdn10", "data=mnist")
    identity = identify(config, architecture_of(config, SIZE, 10))
    torch.save({"state_dict": weights, "tkn": identity}, tmp_path / "last.ckpt")
    summary = {"epochs": 20, "data_source": "full", "error": 0.62}
    (tmp_path / "summary.json").write_text(json.dumps(summary))

    main([str(tmp_path / "last.ckpt"), str(tmp_path / "new" / "rois.json")])
    other = _model()
    content = load_rois(other, tmp_path / "new" / "rois.json")
    assert _rectangles(other) == _rectangles(model)
    assert content["trained"].startswith("tkn-run model=tdn10 data=mnist attention=cauchy penalty.l2=0.0001")
    assert content["trained"].endswith("seed=0; last of 20 epochs on full; error 0.62")


def test_how_a_checkpoint_with_a_budget_came_about(tmp_path: Path) -> None:
    config = OmegaConf.to_container(compose("model=tdn10", "data=mnist", "penalty=budget", "penalty.share=0.5"))
    told = describe_training(tmp_path / "last.ckpt", config)
    assert told.endswith("attention=cauchy penalty=budget penalty.share=0.5 penalty.reach=0.5 seed=0; last")


def test_what_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    for content, message in ((None, "is not a file"), (b"no", "is damaged"), ({"state_dict": {}}, "by tkn-run")):
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(SystemExit, match=message):
            main([str(path), str(tmp_path / "rois.json")])
    assert not (tmp_path / "rois.json").exists()
