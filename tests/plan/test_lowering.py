"""The memory that a plan's activations share."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from engine_cases import targeted
from torch import nn

from tkn import TargetConv2d, build_model
from tkn.backends.cpu.structs import Kind
from tkn.plan.capture import build_graph, frozen
from tkn.plan.lower_maps import MapLowering
from tkn.plan.lower_rows import RowInstruction, RowLowering
from tkn.sequential import TargetSequential


class Branches(nn.Module):
    """Activations that live long, sums, concatenations and two poolings of one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = TargetConv2d(2, 12, 3, padding=1)
        self.second = TargetConv2d(12, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.third = nn.Conv2d(24, 7, 1)
        self.mean = nn.AvgPool2d(2)
        self.maximum = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.relu(self.first(x))
        b = self.norm(self.second(a)) + a
        c = self.third(torch.cat((torch.relu(b), a), dim=1))
        return torch.cat((self.mean(c), self.maximum(c), self.mean(b)), dim=1)


LOWERED = {
    "tdn10": (lambda: build_model("tdn10", (1, 12, 12), 3), (1, 12, 12)),
    "tdn40": (lambda: build_model("tdn40", (3, 8, 8), 2), (3, 8, 8)),
    "branches": (Branches, (2, 8, 8)),
    "chain": (
        lambda: TargetSequential(
            TargetConv2d(1, 9, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 4)
        ),
        (1, 8, 8),
    ),
}


def touched(instruction: RowInstruction) -> tuple[list, list]:
    """The buffers that an instruction reads and writes."""
    read = [buffer for buffer in (instruction.source, *instruction.reads) if buffer is not None]
    return read, [] if instruction.output is None else [instruction.output]


@pytest.mark.parametrize("pairs", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("lanes", [16, 64])
@pytest.mark.parametrize("name", LOWERED)
def test_living_rows_never_share_memory(name: str, lanes: int, pairs: bool) -> None:
    """Whatever is read was written before, and nothing else was written over it."""
    make, size = LOWERED[name]
    graph = build_graph(frozen(targeted(make(), seed=1)), size)
    nodes = list(range(1, len(graph.nodes)))
    lowering = RowLowering(graph, nodes, [0], list(graph.outputs), lanes, torch.float32, pairs=pairs)
    assert pairs == any(instruction.kind == Kind.CONV_PAIRS for instruction in lowering.instructions)
    for one, other in combinations(lowering.buffers, 2):
        alive = one.first <= other.last and other.first <= one.last
        apart = one.offset + one.rows <= other.offset or other.offset + other.rows <= one.offset
        assert apart or not alive
    assert lowering.memory_rows == max(buffer.offset + buffer.rows for buffer in lowering.buffers)

    owner = np.full(lowering.memory_rows, -1)
    whole = {id(buffer): index for index, buffer in enumerate(lowering.buffers)}
    done = dict.fromkeys(range(len(lowering.instructions)), 0)
    for position, begin, end in lowering.steps():
        instruction = lowering.instructions[position]
        assert begin == done[position] < end <= instruction.parts
        done[position] = end
        reads, writes = touched(instruction)
        assert (instruction.kind == Kind.PACK) == (not reads)
        for buffer in reads:
            assert (owner[buffer.offset : buffer.offset + buffer.rows] == whole[id(buffer)]).all()
        for buffer in writes:
            owner[buffer.offset : buffer.offset + buffer.rows] = whole[id(buffer)]
    assert done == {position: instruction.parts for position, instruction in enumerate(lowering.instructions)}


@pytest.mark.parametrize("pairs", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", LOWERED)
def test_maps_share_memory_only_one_after_the_other(name: str, pairs: bool) -> None:
    make, size = LOWERED[name]
    graph = build_graph(frozen(targeted(make(), seed=1)), size)
    lowering = MapLowering(graph, list(range(1, len(graph.nodes))), [0], list(graph.outputs), 16, pairs=pairs)
    for one in lowering.maps:
        if one.length == 0:  # pairs of a map that is read channel by channel
            continue
        assert one.begin % 16 == 0
        pixels = one.first + one.at(np.arange(one.size[0] * one.size[1]))
        numbers = pixels[:, None] + np.arange(one.channels) * one.channel
        assert one.begin <= numbers.min() <= numbers.max() < one.end <= lowering.memory_size - 16
        assert np.unique(numbers).size == numbers.size
        for other in lowering.maps[: one.index]:
            if one.begin < other.end and other.begin < one.end:
                assert one.rewritten
                assert other.rewritten
                assert (one.begin, one.order, one.border) == (other.begin, other.order, other.border)
                assert (one.line, one.pixel, one.channel) == (other.line, other.pixel, other.channel)
                assert lowering.read_until[other.index] < one.index
