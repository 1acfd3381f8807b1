"""Plans of networks that take several tensors, or return several."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from engine_cases import assert_near, targeted
from torch import Tensor, nn
from torch.nn import functional as F

from tkn import TargetConv2d, accelerate, load_plan
from tkn.plan.capture import build_graph, frozen
from tkn.plan.parts import KernelPart
from tkn.plan.plan import Plan


class Body(nn.Module):
    """A map, and a vector of it."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.first = TargetConv2d(channels, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 5, 3, stride=2)
        self.head = nn.Linear(5, 3)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.second(F.relu(self.first(x))))
        return x, self.head(x.mean((2, 3)))


class Features(Body):
    def forward(self, x: Tensor) -> dict[str, Any]:
        maps, scores = self.both(x)
        return {"maps": [maps], "scores": scores, "nested": (scores, {"again": maps}), "none": None, "count": 3}


class Scores(NamedTuple):
    scores: Tensor
    maps: Tensor


class Named(Body):
    def forward(self, x: Tensor) -> Scores:
        maps, scores = self.both(x)
        return Scores(scores, maps)


class ImageAndNumbers(Body):
    """Images with what is known of them, as of a patient."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.last = nn.Linear(4, 6), nn.Linear(9, 2)

    def forward(self, image: Tensor, numbers: Tensor) -> Tensor:
        return self.last(torch.cat([self.both(image)[1], F.relu(self.numbers(numbers))], 1))


class TwoViews(Body):
    """Two images through the same layers."""

    def forward(self, views: dict[str, Tensor], *, weight: Tensor) -> tuple[Tensor, Tensor]:
        left, right = (self.both(views[side])[1] for side in ("left", "right"))
        return left - right, left * weight


def made(network: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return targeted(network(), seed=1)


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [leaf for part in parts for leaf in leaves(part)]


def shape(value: Any) -> Any:
    """A nested value with ones for its tensors."""
    if isinstance(value, dict):
        return {key: shape(part) for key, part in value.items()}
    if isinstance(value, list):
        return [shape(part) for part in value]
    if isinstance(value, tuple):
        return (type(value).__name__, *map(shape, value))
    return 1 if isinstance(value, Tensor) else (value, None)


def assert_same(ours: Any, theirs: Any) -> None:
    assert shape(ours) == shape(theirs)
    for one, other in zip(leaves(ours), leaves(theirs), strict=True):
        assert_near(one, other)


VIEWS = {"left": (2, 9, 8), "right": (2, 9, 8)}


def arguments(network: type[nn.Module], batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(batch)
    image = torch.rand(batch, 2, 9, 8)
    if network is ImageAndNumbers:
        return (image, torch.rand(batch, 4)), {}
    if network is TwoViews:
        return ({"right": torch.rand(batch, 2, 9, 8), "left": image},), {"weight": torch.rand(batch, 3)}
    return (image,), {}


NETWORKS = [
    (Features, (2, 9, 8)),
    (Named, (2, 9, 8)),
    (ImageAndNumbers, ((2, 9, 8), (4,))),
    (ImageAndNumbers, {"numbers": (4,), "image": (2, 9, 8)}),
    (TwoViews, {"views": VIEWS, "weight": (3,)}),
]


def called(network: type[nn.Module], size: Any, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments in the form that a plan of that size takes."""
    args, kwargs = arguments(network, batch)
    if not isinstance(size, dict):
        return args, kwargs
    names = ("views",) if network is TwoViews else ("image", "numbers")
    return (), {**dict(zip(names, args, strict=True)), **kwargs}


@pytest.mark.parametrize(("network", "size"), NETWORKS, ids=lambda value: getattr(value, "__name__", ""))
@torch.no_grad()
def test_plans_take_and_return_what_the_network_does(network: type[nn.Module], size: Any, tmp_path: Path) -> None:
    model = made(network)
    plan = accelerate(model, 3, size)
    assert plan.input_size == size
    assert any(isinstance(part, KernelPart) for part in accelerate(model, 3, size)._program.parts) or plan.timings
    for batch in (1, 3, 7):
        args, kwargs = called(network, size, batch)
        assert_same(plan(*args, **kwargs), model(*args, **kwargs))
    args, kwargs = called(network, size, 4)
    first = accelerate(model, 3)  # of the sizes of its first call
    assert_same(first(*args, **kwargs), model(*args, **kwargs))
    assert first.input_size == size
    if network is Named:
        with pytest.raises(ValueError, match=r"a file can't hold what it returns, Scores"):
            plan.save(tmp_path / "plan")
        return
    plan.save(tmp_path / "plan")
    for other in (load_plan(tmp_path / "plan"), copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert_same(other(*args, **kwargs), model(*args, **kwargs))
        assert other.input_size == size


@pytest.mark.parametrize("small", [True, False])
@torch.no_grad()
def test_both_arrangements(small: bool) -> None:
    for network, size in NETWORKS:
        model = made(network)
        plan = Plan(build_graph(frozen(model), size), 5, small=small)
        assert any(isinstance(part, KernelPart) for part in plan._program.parts)
        for batch in (1, 5, 17):
            args, kwargs = called(network, size, batch)
            assert_same(plan(*args, **kwargs), model(*args, **kwargs))


@torch.no_grad()
def test_an_output_that_is_an_input_or_comes_twice() -> None:
    class Through(Body):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            maps, scores = self.both(x)
            return x, scores, scores, y, maps.flatten(1)

    model = made(Through)
    plan = accelerate(model, 2, ((2, 9, 8), (2, 5, 5)))
    x, y = torch.rand(2, 2, 9, 8), torch.rand(2, 2, 5, 5)
    assert_same(plan(x, y), model(x, y))


@torch.no_grad()
def test_a_network_of_vectors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3)).eval()
    plan = accelerate(model, 2, (7,))
    assert plan.fallbacks == ()
    x = torch.rand(2, 7)
    assert_near(plan(x), model(x))


IMAGES, NUMBERS = torch.zeros(3, 2, 9, 8), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((IMAGES,), {}, "the plan's arguments must have 2 items, not 1"),
        ((), {"image": IMAGES, "numbers": NUMBERS}, "the plan's arguments must have 2 items, not 0"),
        ((IMAGES, NUMBERS), {"more": NUMBERS}, "the plan's arguments by name must have none, not 'more'"),
        ((NUMBERS, IMAGES), {}, "the plan takes as input 1 [B, 2, 9, 8], not [3, 4]"),
        ((IMAGES, NUMBERS[:2]), {}, "as many images in each input, not [3, 2]"),
        ((IMAGES, 4), {}, "the plan takes tensors, not a int"),
        ((IMAGES, NUMBERS.long()), {}, "the plan takes float32 on the CPU, not torch.int64"),
    ],
)
def test_other_arguments_are_refused(args: tuple[object, ...], kwargs: dict[str, object], message: str) -> None:
    plan = accelerate(made(ImageAndNumbers), 3, ((2, 9, 8), (4,)))
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(*args, **kwargs)


def test_missing_keys_are_named() -> None:
    plan = accelerate(made(TwoViews), 3, {"views": VIEWS, "weight": (3,)})
    with pytest.raises(ValueError, match=re.escape("arguments by name['views'] must have 'left', 'right', not 'left'")):
        plan(views={"left": torch.rand(3, 2, 9, 8)}, weight=torch.rand(3, 3))
    unmade = accelerate(made(ImageAndNumbers), 3)
    with pytest.raises(ValueError, match="by their places, or all by name"):
        unmade(torch.rand(3, 2, 9, 8), numbers=torch.rand(3, 4))


@pytest.mark.parametrize(
    "change",
    [
        {"form": None},
        {"form": {"args": [{"input": 0}], "kwargs": {}, "result": {"input": 0}}},
        {"form": {"args": [{"input": 0}, 5], "kwargs": {"a": {"input": 1}}, "result": {"input": 0}}},
        {"form": {"args": [{"input": 0}, {"input": 2}], "kwargs": {}, "result": {"input": 0}}},
        {"form": {"args": [{"input": 0}, {"input": 1}], "kwargs": {}, "result": {"input": 1}}},
        {"form": {"args": [{"input": 0}, {"input": 1}], "kwargs": {}, "result": {"tensor": "5.weight"}}},
        {"form": {"args": [{"input": 0}, {"input": 1}], "kwargs": {}}},
        {"output": []},
        {"output": [2.0]},
        {"output": [10**6]},
        {"input_size": [[2, 9, 8]]},
        {"input_size": [[2, 9, 8], [4, 1, 1]]},
        {"input_size": [2, 9, 8]},
    ],
)
def test_files_of_other_forms_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    accelerate(made(ImageAndNumbers), 3, ((2, 9, 8), (4,))).save(tmp_path / "plan")
    data = (tmp_path / "plan").read_bytes()
    tensors = safetensors.torch.load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    content = {**json.loads(header["__metadata__"]["tkn.plan"]), **change}
    (tmp_path / "other").write_bytes(safetensors.torch.save(tensors, {"tkn.plan": json.dumps(content)}))
    with pytest.raises(ValueError, match="damaged"):
        load_plan(tmp_path / "other")


@pytest.mark.parametrize("size", [(), {}, ((2, 9, 8), 4), {"x": None}, ((2, 9, 8), (0,)), "images", {1: (2, 9, 8)}])
def test_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"input_size={size!r} must be (channels, height, width)")):
        accelerate(nn.Conv2d(2, 1, 1), 1, size)
