"""What the tests of the ROI engine share: random layers, their float64 truth, and how near two results are."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from forked import run_forked
from torch import Tensor, nn

from tkn import TargetConv1d, TargetConv2d, TargetConv3d
from tkn.layers import RoiLayer
from tkn.sequential import TargetSequential

TARGETS = (TargetConv1d, TargetConv2d, TargetConv3d)
ROIS = ("random", "pixel", "border", "full", "edge")


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference as a part of the largest number expected."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    error, largest = float((actual - expected).abs().max()), float(expected.abs().max())
    return error / largest if largest > 0 else error


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    error = difference(actual, expected)
    assert error <= tolerance, f"relative difference {error:.3g}"  # NaN fails


def place_rois(layer: RoiLayer, rois: str, size: tuple[int, ...], seed: int) -> None:
    """Set loc and scale for maps of `size`: anywhere, one pixel, across the borders, whole, the last of each axis."""
    generator = torch.Generator().manual_seed(seed)
    shape, length = layer.loc.shape, torch.tensor(size, dtype=torch.float64)[:, None]
    loc = torch.rand(shape, generator=generator, dtype=torch.float64)
    scale = 0.15 + 0.6 * torch.rand(shape, generator=generator, dtype=torch.float64)
    if rois in ("pixel", "edge"):
        pixel = (loc * length).floor() if rois == "pixel" else length - 1
        loc, scale = (pixel + 0.4) / length, 0.3 * math.sqrt(2) / length.expand(shape)
    elif rois == "border":
        loc, scale = loc.round(), scale / 2
    elif rois == "full":
        loc, scale = torch.full_like(loc, 0.5), torch.ones_like(scale)
    with torch.no_grad():
        layer.loc.copy_(loc)
        layer.scale.copy_(scale)


def targeted(model: nn.Module, seed: int = 0, engine: str | None = None) -> nn.Module:
    """`model` with random ROIs in its target layers, one of them the whole map, and as if trained in its norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, TARGETS):
                module.loc.copy_(0.2 + 0.6 * torch.rand(module.loc.shape, generator=generator))
                module.scale.copy_(0.2 + 0.4 * torch.rand(module.scale.shape, generator=generator))
                module.loc[:, 0], module.scale[:, 0] = 0.5, 1.0
                module.engine = engine or module.engine
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and module.running_mean is not None:
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) / 2)
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
                if module.affine:
                    module.weight.copy_(0.5 + torch.rand(module.weight.shape, generator=generator))
                    module.bias.copy_(torch.randn(module.bias.shape, generator=generator) / 2)
    return model


def truth(model: nn.Module) -> nn.Module:
    """A copy in float64 that torch computes."""
    return with_engine(model, "dense").double()


def with_engine(model: nn.Module, engine: str) -> nn.Module:
    """A copy whose target layers are computed by `engine`."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, TARGETS):
            module.engine = engine
    return model


def engine_of(output: Tensor) -> str:
    """Which engine computed a target layer's output that has a gradient."""
    assert output.grad_fn is not None
    return "roi" if "InRois" in output.grad_fn.name() else "dense"


def inputs_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [x, *model.parameters()]


def results(model: nn.Module, x: Tensor, seed: int = 0) -> list[Tensor]:
    """The output and the gradients of the input and of every parameter, for one random gradient of the output."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = model(x)
    downstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad(output, inputs_of(model, x), downstream.to(output.dtype))]


def assert_same_results(model: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    """Output and gradients equal those of torch in float64."""
    ours, theirs = results(model, x), results(truth(model), x.double())
    names = ["output", "input", *(name for name, _ in model.named_parameters())]
    for name, one, other in zip(names, ours, theirs, strict=True):
        error = difference(one, other)
        assert error <= tolerance, f"{name}: relative difference {error:.3g}"


@dataclass(frozen=True)
class Case:
    """A target layer and what follows it."""

    number: int
    batch: int
    size: tuple[int, int]
    channels: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    bias: bool
    rois: str
    attention: str
    clip: bool
    relu: bool
    pool: tuple[str, tuple[int, int]] | None
    padding_mode: str

    def __str__(self) -> str:
        kernel = "x".join(map(str, self.kernel))
        inputs, outputs = self.channels
        return f"{self.number}-b{self.batch}-{inputs}to{outputs}-k{kernel}-{self.rois}"

    def layer(self, **options: Any) -> TargetConv2d:
        return TargetConv2d(
            *self.channels,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias,
            attention=self.attention,
            clip=self.clip,
            padding_mode=self.padding_mode,
            **options,
        )

    @property
    def output_size(self) -> tuple[int, int]:
        """Of the convolution."""
        reach = [d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True)]
        if self.padding == "same":
            return self.size
        zeros = (0, 0) if isinstance(self.padding, str) else self.padding
        height, width = (
            (n + 2 * z - r - 1) // s + 1 for n, z, r, s in zip(self.size, zeros, reach, self.stride, strict=True)
        )
        return height, width

    def network(self, **options: Any) -> TargetSequential:
        """With ROIs set."""
        torch.manual_seed(self.number)
        layer = self.layer(**options)
        place_rois(layer, self.rois, self.output_size, self.number)
        network = TargetSequential(layer)
        if self.relu:
            network.append(nn.ReLU())
        if self.pool is not None:
            kind, kernel = self.pool
            network.append(nn.MaxPool2d(kernel) if kind == "max" else nn.AvgPool2d(kernel))
        return network

    def images(self, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(self.number)
        return torch.randn(self.batch, self.channels[0], *self.size, generator=generator, dtype=dtype)


def cases(count: int, seed: int, *, batches: tuple[int, ...], large: bool) -> list[Case]:
    """`count` combinations in which every value of every option comes equally often, in a fixed random order."""
    random = Random(seed)
    options: dict[str, list[Any]] = {
        "batch": list(batches),
        "size": [(9, 9), (7, 10), (11, 6)] if large else [(5, 6), (7, 5)],
        "channels": [(1, 20), (3, 8), (24, 40), (18, 1), (4, 36), (40, 12)] if large else [(1, 4), (4, 2), (2, 6)],
        "kernel": [(1, 1), (3, 3), (5, 5), (2, 4), (3, 1)] if large else [(1, 1), (2, 2), (3, 3), (3, 2)],
        "stride": [(1, 1), (1, 1), (2, 2), (2, 1)],
        "padding": ["same", "valid", (0, 0), (1, 1), (2, 1)],
        "dilation": [(1, 1), (1, 1), (2, 1)],
        "groups": [1, 1, 2, 4],
        "bias": [True, False],
        "rois": list(ROIS),
        "attention": ["cauchy", "gaussian", "flat"],
        "clip": [True, True, True, False],
        "relu": [True, False],
        "pool": [None, ("max", (2, 2)), ("average", (2, 2)), ("max", (1, 2)), ("average", (2, 1))],
        "padding_mode": ["zeros", "zeros", "zeros", "reflect", "circular", "replicate"],
    }
    columns = {name: random.sample((values * count)[:count], count) for name, values in options.items()}
    chosen = []
    for number, values in enumerate(zip(*columns.values(), strict=True)):
        case = dict(zip(columns, values, strict=True))
        if case["padding"] == "same":  # torch's own restriction
            case["stride"] = (1, 1)
        while any(channels % case["groups"] for channels in case["channels"]):
            case["groups"] //= 2
        if not case["clip"] and case["rois"] in ("pixel", "edge"):  # a window of 1e-22 elsewhere
            case["rois"] = "random"
        made = Case(number=number, **case)
        if made.pool is not None and any(k > n for k, n in zip(made.pool[1], made.output_size, strict=True)):
            made = replace(made, pool=None)
        chosen.append(made)
    return chosen


def python(code: str, **environment: str) -> Any:
    """Runs a program in a process of its own; what it prints last, as JSON."""
    done = run_forked(code, OMP_NUM_THREADS="1", **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def new_python(code: str, folder: Path | None = None, **environment: str) -> Any:
    """The same where importing, or the end of the process, is part of what is tested."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def same_with_threads(compute: Callable[[], list[Tensor]]) -> None:
    """Two threads give the same bits as one, every time."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = compute()
        torch.set_num_threads(2)
        for _ in range(3):
            for one, other in zip(alone, compute(), strict=True):
                assert torch.equal(one, other)
    finally:
        torch.set_num_threads(before)
