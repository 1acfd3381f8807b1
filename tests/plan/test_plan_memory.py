"""Networks that write over their own values, and numbers that depend on the batch: plans and files mean the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from engine_cases import assert_near
from torch import Tensor, nn
from torch.nn import functional as F

from tkn import accelerate, load_plan


class Written(nn.Module):
    """What `write` does to a value is seen by whoever reads it later."""

    def __init__(self, write: Callable[[Tensor], object], inner: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4 if inner else 3, 2, 3)
        self.write, self.inner = write, inner

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x)) if self.inner else x
        self.write(x)
        return self.conv(x)


WRITES = {
    "slice": lambda x: nn.ReLU6(inplace=True)(x[:, :2]),
    "chunk": lambda x: nn.Hardtanh(-0.1, 0.3, inplace=True)(x.chunk(2, 1)[0]),
    "view": lambda x: F.hardtanh(x.flatten(2), -0.1, 0.3, True),
    "contiguous": lambda x: F.hardtanh(x.contiguous(), -0.1, 0.3, inplace=True),
    "to": lambda x: nn.ReLU(inplace=True)(x.to(torch.float32)),
    "identity": lambda x: nn.ReLU(inplace=True)(nn.Identity()(x)),
    "method": lambda x: x.clamp_(-0.1, 0.3),
    "itself": lambda x: F.relu6(x, True),
}


@pytest.mark.parametrize("inner", [False, True], ids=["images", "a map"])
@pytest.mark.parametrize("name", WRITES)
@torch.no_grad()
def test_what_is_written_over_is_read_later(name: str, inner: bool, tmp_path: Path) -> None:
    model = Written(WRITES[name], inner).eval()
    plan = accelerate(model, 3, (3, 6, 7))
    for batch in (1, 3, 5):
        x = 20 * torch.randn(batch, 3, 6, 7)
        expected = model(x.clone())
        assert_near(plan(x.clone()), expected)
    with suppress(ValueError):  # right, or refused
        plan.save(tmp_path / "plan")
        assert_near(load_plan(tmp_path / "plan")(x.clone()), expected)
        assert_near(copy.deepcopy(plan)(x.clone()), expected)


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.relu, self.conv = nn.ReLU(inplace=True), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.relu(x))


@torch.no_grad()
def test_a_file_that_would_forget_what_was_written_is_refused(tmp_path: Path) -> None:
    model, x = PreActivation().eval(), torch.randn(2, 3, 6, 6)
    plan = accelerate(model, 2, (3, 6, 6))
    assert_near(plan(x.clone()), model(x.clone()))
    with pytest.raises(ValueError, match=r"a file can't hold what torch runs in relu \(ReLU\)"):
        plan.save(tmp_path / "plan")


class ByNumber(nn.Module):
    """A part of the batch, of which there are as many images in all batches that are tried."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        some = self.conv(x)[:2]
        return self.conv(x) / some.shape[0] + some.reshape(some.shape[0], -1).sum()


@torch.no_grad()
def test_numbers_that_are_the_same_by_chance() -> None:
    model = ByNumber().eval()
    plan = accelerate(model, 3, (3, 6, 6))
    for batch in (1, 2, 5):
        x = torch.rand(batch, 3, 6, 6)
        assert_near(plan(x), model(x))


class Film(nn.Module):
    """Numbers for each channel, made of a vector, scale and shift a map."""

    def __init__(self, cut: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear, self.cut = nn.Conv2d(3, 4, 3), nn.Linear(5, 8), cut

    def forward(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.cut(self.linear(v))
        y = self.conv(x)
        return y * scale + shift, y.mean((2, 3), keepdim=True)[:, :3, 0, 0]


@pytest.mark.parametrize(
    "cut",
    [
        lambda g: (g.chunk(2, 1)[0][:, :, None, None], g.chunk(2, 1)[1][:, :, None, None]),
        lambda g: (g[:, :4, None, None], g[:, 4:, None, None]),
        lambda g: g[:, :, None, None].chunk(2, 1),
    ],
)
@torch.no_grad()
def test_parts_of_vectors_beside_maps(cut: Callable[[Tensor], tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    model = Film(cut).eval()
    plan = accelerate(model, 3, ((3, 7, 7), (5,)))
    plan.save(tmp_path / "plan")
    loaded = load_plan(tmp_path / "plan")
    for batch in (1, 3, 6):
        x, v = torch.rand(batch, 3, 7, 7), torch.randn(batch, 5)
        for made in (plan, loaded):
            for ours, theirs in zip(made(x, v), model(x, v), strict=True):
                assert_near(ours, theirs)
