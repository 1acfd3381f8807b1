"""Changed plan files give a ValueError, or a plan that computes what torch computes of it; never anything else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import targeted
from mutations import ODD, Mutator, at, parts, places, whole
from torch import Tensor, nn
from torch.nn import functional as F

from tkn import AttentiveRegularization2d, TargetConv2d, accelerate, load_plan
from tkn.plan.compare import difference, fixed_images
from tkn.plan.graph import Convolve
from tkn.plan.parts import Program
from tkn.plan.plan import Plan

SIZE = (2, 7, 6)


class Tiny(nn.Module):
    """A bit of everything that files hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            TargetConv2d(2, 4, 3, padding=1),
            TargetConv2d(4, 4, 3, padding=1, attention="gaussian"),
        )
        self.norm, self.last_norm = nn.BatchNorm2d(4), nn.BatchNorm1d(3)
        self.pool, self.mean = nn.MaxPool2d(2), nn.AvgPool2d(3, 2, 1)
        self.attention = AttentiveRegularization2d(4, clip=True)
        self.weight = nn.Parameter(torch.rand(4, 1, 1))
        self.layer_norm, self.act = nn.LayerNorm(4), nn.Mish()
        self.uneven, self.up = nn.AvgPool2d(2, ceil_mode=True, divisor_override=3), nn.Upsample(scale_factor=1.5)
        self.linear, self.last = nn.Linear(8 * 9, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.norm(self.first(x)))
        b = self.pool(a + self.second(a))
        b = self.attention(b * self.weight)
        b = self.act(self.layer_norm(b.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        b = b.reshape(b.size(0), 2, -1, b.shape[2], b.shape[3]).transpose(1, 2).contiguous().flatten(1, 2)
        b = F.pad(b, (0, 0, 0, 0))[:, :, :, :3]
        c = self.mean(a)[:, :, :3, :3]
        d = F.interpolate(self.up(self.uneven(a)), size=(3, 4), mode="bilinear")
        c = c + F.adaptive_max_pool2d(d, (3, 3))
        return self.last(self.last_norm(self.linear(torch.cat((torch.relu(b), c), 1).flatten(1)))).softmax(dim=1)


@pytest.fixture(scope="module")
def data() -> bytes:
    torch.manual_seed(0)
    return accelerate(targeted(Tiny(), seed=1).eval(), 2, SIZE, classes=["a", "b"])._bytes()


def check(path: Path, data: bytes, seed: int, count: int) -> dict[str, int]:
    """How many changed files were plans all the same, by kind of the change."""
    mutator, plans = Mutator(data, seed), dict[str, int]()
    for number in range(count):
        kind, changed = mutator.file()
        path.write_bytes(changed)
        what = f"seed {seed}, file {number}: {kind}"
        try:
            plan = load_plan(path)
            plan(torch.zeros(1, *plan.input_size))
        except ValueError as error:
            if str(path) not in str(error):
                raise AssertionError(what) from error
            continue
        except Exception as error:
            raise AssertionError(what) from error
        plans[kind] = plans.get(kind, 0) + 1
        by_torch = Program.by_torch(plan._graph)
        # What an infinite weight makes of the padding depends, in torch, on the number of images.
        for batch in (1, 3) if has_finite_weights(plan) else (2,):
            x = torch.rand(batch, *plan.input_size, generator=torch.Generator().manual_seed(batch))
            error = difference(plan(x), by_torch(x))
            assert error < 1e-3, f"{what} differs by {error}"
    return plans


def has_finite_weights(plan: Plan) -> bool:
    convolutions = [n.operation for n in plan._graph.nodes if isinstance(n.operation, Convolve)]  # type: ignore[union-attr]
    return all(bool(conv.weight.isfinite().all()) for conv in convolutions)


@pytest.mark.filterwarnings("ignore:torch runs the plan")  # what numbers are lost in infinities
@pytest.mark.compact
def test_changed_files(data: bytes, tmp_path: Path) -> None:
    plans = check(tmp_path / "net.plan", data, seed=0, count=300)
    # Some must be plans still, or nothing was tried: of other notes, or computed anew.
    assert 10 <= sum(plans.values()) <= 200, plans
    assert any("consistent" in kind for kind in plans)


def changed_everywhere(data: bytes, values: Callable[[int], list[Any]]) -> Iterator[tuple[str, bytes]]:
    """Files that lack one thing, and such where it is one of the `values` for its place: all things of the JSON."""
    header, content, numbers = parts(data)
    for index, path in enumerate(places(content)[1:]):
        lacking = copy.deepcopy(content)
        del at(lacking, path[:-1])[path[-1]]
        yield f"without {path}", whole(header, lacking, numbers)
        for value in values(index):
            other = copy.deepcopy(content)
            at(other, path[:-1])[path[-1]] = copy.deepcopy(value)
            if other != content:
                yield f"{path} = {value!r}", whole(header, other, numbers)


def check_everywhere(path: Path, data: bytes, values: Callable[[int], list[Any]]) -> None:
    path.write_bytes(data)
    x = fixed_images(2, SIZE)
    expected = load_plan(path)(x)
    for what, changed in changed_everywhere(data, values):
        path.write_bytes(changed)
        try:
            plan = load_plan(path)
            assert plan.input_size == SIZE
            for check in plan._checks:  # as the first call does
                check()
        except ValueError as error:
            if str(path) not in str(error):
                raise AssertionError(what) from error
            continue
        except Exception as error:
            raise AssertionError(what) from error
        # The fields that may be changed do not change what it computes.
        assert difference(Program.by_torch(plan._graph)(x), expected) < 1e-3, what


def test_every_field(data: bytes, tmp_path: Path) -> None:
    check_everywhere(tmp_path / "net.plan", data, lambda index: [ODD[index % len(ODD)]])


@pytest.mark.slow
def test_every_field_with_every_odd_value(data: bytes, tmp_path: Path) -> None:
    check_everywhere(tmp_path / "net.plan", data, lambda _: list(ODD))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch runs the plan")
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_changed_files(data: bytes, tmp_path: Path, seed: int) -> None:
    check(tmp_path / "net.plan", data, seed, count=1000)
