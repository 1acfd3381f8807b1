"""The README's own Python: its section "In your own code", block by block, on images of several sizes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tkn.layers import roi_layers

README = Path(__file__).parents[1] / "README.md"
BATCH = 2


def blocks() -> list[str]:
    """The Python blocks of the section, in their order."""
    section = re.search(r"^## In your own code$(.*?)^## ", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert section is not None
    return re.findall(r"^```python\n(.*?)^```$", section[1], re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("pixels", "steps"), [(32, 2), (64, 2), (224, 1)])
def test_in_your_own_code(pixels: int, steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    labels = torch.tensor([3, 999])
    text = "\n".join(blocks())
    for written, here in [("(3, 224, 224)", f"(3, {pixels}, {pixels})"), ("batch_size=128", f"batch_size={BATCH}")]:
        assert written in text
        text = text.replace(written, here)
    variables: dict[str, Any] = {"batches": [(torch.randn(BATCH, 3, pixels, pixels), labels) for _ in range(steps)]}
    exec(compile(text, str(README), "exec"), variables)

    assert variables["y"].shape == (8, 32, 28, 28)
    model, sizes = variables["model"], variables["sizes"]
    layers = roi_layers(model)
    assert sizes.keys() == layers.keys()
    assert sizes["conv1"] == (pixels // 2, pixels // 2)
    for name, layer in layers.items():
        assert layer.scale.ne(1).any()  # it learns
        sides = layer.rois(sizes[name]).diff(dim=-1)
        assert sides.min() >= min(3, *sizes[name])
    assert f"{variables['report'].total_dense:,}" in capsys.readouterr().out
    expected = model.eval()(variables["images"])
    torch.testing.assert_close(variables["scores"], expected, rtol=1e-3, atol=1e-3)
