"""The scripts in `examples/`, at tiny sizes, each as a program of its own, and the page that goes with them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from forked import run_forked
from torch import nn
from torch.nn import functional as F

import tkn

ROOT = Path(__file__).parents[1]
EXAMPLES, PAGE = ROOT / "examples", ROOT / "docs" / "own_network.md"


def run(name: str, *arguments: str, folder: Path) -> str:
    """What the script prints, in `folder`."""
    code = f"import runpy; runpy.run_path({str(EXAMPLES / name)!r}, run_name='__main__')"
    done = run_forked(code, *arguments, folder=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return str(done.stdout)


def test_own_network_and_the_use_of_its_plan(tmp_path: Path) -> None:
    tiny = ("--side", "8", "--width", "4", "--steps", "30", "--batch", "8", "--share", "0.6", "--out", "own.plan")
    printed = run("own_network.py", *tiny, folder=tmp_path)
    errors = [float(number) for number in re.findall(r"([\d.]+) % wrong", printed)]
    assert len(errors) == 4
    assert errors[1] == errors[0]  # converting changes nothing
    assert errors[3] == pytest.approx(errors[2], abs=100 / 64 + 0.1)  # nor does the plan, but for a tie
    inside, dense = (int(n.replace(",", "")) for n in re.findall(r"([\d,]{3,}) of ([\d,]+)", printed)[0])
    assert inside == pytest.approx(0.6 * dense, rel=0.02)
    assert len(re.findall(r"[\d.]+ ms for 8 images", printed)) == 2

    used = run("use_plan.py", "own.plan", "--side", "8", "--images", "3", folder=tmp_path)
    assert len(re.findall(r"^image \d: (rows|columns) [12] \(\d+%\)$", used, re.MULTILINE)) == 3


def test_finding_digits_on_pages(tmp_path: Path) -> None:
    tiny = ("--source", "embedded", "--steps", "3", "--share", "0.9", "--pages", "1", "--side", "112", "--stride", "14")
    printed = run("find_digits.py", *tiny, "--threshold", "0.2", "--out", "page.png", folder=tmp_path)
    assert re.search(r"^\d of 4 digits found, \d+ wrong boxes, on 1 pages$", printed, re.MULTILINE)
    assert re.search(r"^[\d.]+ pages of 112x112 a second, \d+ windows$", printed, re.MULTILINE)
    assert (tmp_path / "page.png").stat().st_size > 5000


def test_the_page_of_ones_own_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of docs/own_network.md, block by block, on a small network."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    text = "\n".join(blocks)
    for written, here in [("(3, 96, 96)", "(3, 8, 8)"), ("batch_size=128", "batch_size=2")]:
        assert written in text
        text = text.replace(written, here)
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    images = torch.randn(2, 3, 8, 8)
    variables = {"tkn": tkn, "torch": torch, "F": F, "trained": nn.Sequential(*layers), "images": images}
    variables["batches"] = [(images, torch.tensor([0, 1]))] * 2
    exec(compile(text, str(PAGE), "exec"), variables)
    model, scores = variables["model"], variables["scores"]
    assert isinstance(model, nn.Module)
    torch.testing.assert_close(scores, model.eval()(images), rtol=1e-4, atol=1e-4)
    assert model[0].scale.max() < 1
