"""How a graph is best computed on this machine: by which kernels, if they are right, or by torch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from math import inf, prod

import numpy as np
import torch
from torch import Tensor

from tkn.backends.cpu.build import available, kernels
from tkn.backends.cpu.rows import tile_lanes
from tkn.plan.compare import TOLERANCE, TOLERANCES, Error, error_of, largest_difference, random_images, random_inputs
from tkn.plan.folded import folded
from tkn.plan.graph import Convolve, Graph, Input, Pooling, UnevenMean
from tkn.plan.mixed import mixed
from tkn.plan.neighbours import with_neighbours
from tkn.plan.parts import (
    KernelPart,
    MapPart,
    Part,
    PartCosts,
    Program,
    RowPart,
    Scratch,
    TorchPart,
    Values,
    numbers,
    split,
)
from tkn.plan.ready import plans_run

#: Up to this batch size vectors may go over the pixels or channels of one image: whichever is faster.
_SMALL = 16
#: Arrangements are timed on so many images at most.
_MOST_IMAGES = 256
#: Vectors over the images are not tried where so many of their numbers, or more, would be of none.
_EMPTY = 8
#: Each way is timed for so many seconds, or so many times if that takes longer: threads that slept are slow at first.
_SECONDS, _REPEATS = 0.02, 3
#: What takes so many seconds is not tried on one thread; what takes less, not by the kernels and torch together.
_LONG = 0.002
#: Nor are these tried together where torch takes so many times as long.
_RIVAL = 1.5
#: What takes so many times as long as another way is not timed again.
_HOPELESS = 1.5
#: Numbers of activations and taps for which lists are made; they take about a hundred bytes each.
_MOST_LISTED = 2**27
#: The batches on which parts are compared with torch, and that of the whole: some networks squeeze single images.
_BATCHES, _BATCH = (1, 3), 3


def arranged(graph: Graph, batch_size: int, small: bool | None = None, *, pairs: bool = False) -> Program:
    """The fastest right way to compute batches of `batch_size`; by torch, after a warning, if the engine can't.

    `small`: with vectors over one image (True) or over several (False); by default whichever is faster, or torch if it
    is faster than both. `pairs`: the engine multiplies pairs of bfloat16 where that is faster.
    """
    whole = _Whole(graph)
    program = _chosen(graph, batch_size, small, whole, pairs=pairs)
    program.error = whole.error(program)
    return program


def _chosen(graph: Graph, batch_size: int, small: bool | None, whole: _Whole, *, pairs: bool) -> Program:
    by_torch = _by_torch(graph, whole)
    if not (available(torch.float32) and plans_run()):
        return _fastest(by_torch, graph, batch_size)
    if _list_numbers(graph) > _MOST_LISTED:
        warnings.warn(f"torch runs the plan: images of {_sizes(graph)} are too large for the engine", stacklevel=3)
        return _fastest(by_torch, graph, batch_size)
    programs, wrong = _by_kernels(graph, batch_size, small, whole, pairs=pairs)
    if not programs and wrong:
        warnings.warn(f"torch runs the plan: {wrong[0]}", stacklevel=3)
    if small is not None:
        return _fastest(programs or by_torch, graph, batch_size)
    return _mixed(_fastest(programs + by_torch, graph, batch_size), programs, by_torch, whole, batch_size)


def _mixed(
    fastest: Program, programs: list[Program], by_torch: list[Program], whole: _Whole, batch_size: int
) -> Program:
    """The `fastest`, or the kernels and torch together, where they take about as long and together they are faster."""
    timings = fastest.timings
    known = [way for way in programs if any(isinstance(part, KernelPart) for part in way.parts)]
    ours, theirs = (
        min((way for way in ways if way.way in timings), key=lambda way: timings[way.way], default=None)
        for ways in (known, by_torch)
    )
    if ours is None or theirs is None:
        return fastest
    costs = timings[ours.way], timings[theirs.way]
    if fastest is theirs:
        names = [node.name for node in ours.graph.nodes if not isinstance(node.operation, Input)]
        fastest.left = [PartCosts(names[0], names[-1], *costs)]
    if min(costs) < _LONG or costs[1] > _RIVAL * costs[0]:
        return fastest
    (*_, part) = (part for part in ours.parts if isinstance(part, KernelPart))
    lanes = part.lanes if isinstance(part, RowPart) else None
    pairs = any(part.paired for part in ours.parts)
    make = partial(_kernel_part, ours.graph, lanes=lanes, scratch=Scratch(numbers), pairs=pairs)
    program, left = mixed(
        ours, make, partial(_part_seconds, batch_size=batch_size), channels_last=theirs is by_torch[-1]
    )
    if program is None or whole.difference(program) > _tolerance(pairs=pairs):
        return fastest
    taken = _seconds(partial(program, *_images(ours.graph, batch_size)), timings[fastest.way])
    best = program if taken < timings[fastest.way] else fastest
    best.timings = dict(sorted({**timings, program.way: taken}.items(), key=lambda item: item[1]))
    if best is program:
        best.left = left
    return best


def _images(graph: Graph, batch_size: int) -> list[Tensor]:
    """What ways are timed on."""
    batch = min(batch_size, _MOST_IMAGES)
    return [torch.zeros(batch, *shape, dtype=torch.float32, device="cpu") for shape in graph.input_shapes]


def _part_seconds(part: Part, batch_size: int) -> float:
    return _seconds(partial(part.run, _inputs_of(part, min(batch_size, _MOST_IMAGES))), inf)


def _inputs_of(part: Part, batch: int) -> Values:
    """Random ones, of both signs."""
    return {
        position: 2 * random_images(batch, part.graph.nodes[position].shape, seed=position) - 1
        for position in part.inputs
    }


def _tolerance(*, pairs: bool) -> float:
    return TOLERANCES[torch.bfloat16 if pairs else torch.float32]


def _by_torch(graph: Graph, whole: _Whole) -> list[Program]:
    """Ways in which torch computes a graph; those that do what its operations do one by one."""
    folds = [
        Program.by_torch(folded(graph, channels_last=last), f"torch{', channels last' if last else ''}")
        for last in (False, True)
    ]
    return [program for program in folds if whole.difference(program) <= TOLERANCE] or [whole.plain]


def _by_kernels(
    graph: Graph, batch_size: int, small: bool | None, whole: _Whole, *, pairs: bool
) -> tuple[list[Program], list[str]]:
    """Ways in which the engine computes a graph, and what is wrong with others."""
    graph = with_neighbours(graph)
    trials = _Trials(graph)
    wrong, programs = [], []
    # Over one image pairs are made in passes of their own, which can take longer than they save.
    ways = [(lanes, rounds) for lanes in _lanes(batch_size, small) for rounds in {pairs, pairs and lanes is not None}]
    for lanes, rounds in ways:
        try:
            with np.errstate(all="ignore"):  # numbers that are not finite are the network's own
                parts = list(_parts(graph, lanes, pairs=rounds))
        except ValueError as error:  # too large
            wrong.append(str(error))
            continue
        program = Program(graph, parts, _way(lanes, parts))
        if rounds and lanes is None and not any(part.paired for part in parts):
            continue  # the same as without
        # Parts can be right where the whole is not: what torch overwrites in one may be read in another.
        differs = max(trials.difference(program), whole.difference(program))
        if differs <= _tolerance(pairs=pairs):
            programs.append(program)
        else:
            wrong.append(f"the engine's result differs by {differs:.1e}")
    return programs, wrong


def _on_one_thread(program: Program) -> Program:
    """The same of maps: where layers are small, threads that wait for each other's numbers can take longer."""
    parts = [part.on_one_thread() if isinstance(part, MapPart) else part for part in program.parts]
    return Program(program.graph, parts, f"{program.way}, one thread")


def _fastest(programs: list[Program], graph: Graph, batch_size: int) -> Program:
    few = batch_size < torch.get_num_threads()
    if len(programs) == 1 and not few:
        return programs[0]
    inputs = _images(graph, batch_size)
    timed: list[tuple[float, Program]] = []

    def time_way(program: Program) -> float:
        best = min((seconds for seconds, _ in timed), default=inf)
        timed.append((_seconds(partial(program, *inputs), best), program))
        return timed[-1][0]

    for program in programs:
        if time_way(program) < _LONG and few and any(isinstance(part, MapPart) for part in program.parts):
            time_way(_on_one_thread(program))
    timed.sort(key=lambda pair: pair[0])
    fastest = timed[0][1]
    fastest.timings = {program.way: seconds for seconds, program in timed}
    return fastest


def _sizes(graph: Graph) -> str:
    return " and ".join(map(str, graph.input_shapes))


def _way(lanes: int | None, parts: list[Part]) -> str:
    images = "one image" if lanes is None else f"{lanes} images"
    return f"vectors over {images}{', bfloat16' if any(part.paired for part in parts) else ''}"


def _list_numbers(graph: Graph) -> int:
    """How many numbers of activations and taps of output pixels the lists of a graph would hold."""
    count = 0
    for node in graph.nodes:
        if node.size is not None and not node.by_torch:
            count += prod(node.size)
        if isinstance(node.operation, Convolve | Pooling | UnevenMean):
            count += prod(node.operation.geometry.output_size) * node.operation.geometry.taps
    return count


def _lanes(batch_size: int, small: bool | None) -> Iterator[int | None]:
    """The tiles that may be the fastest, in images; None for vectors over one image."""
    if small is not False and batch_size <= _SMALL:
        yield None
        if small:
            return
    width = kernels(torch.float32).tkn_width()
    if small is None and batch_size * _EMPTY <= width // 2:
        return
    widest = tile_lanes(batch_size, torch.get_num_threads(), width)
    lanes = {widest, max(width, widest // 2)} if batch_size > width // 2 else set()
    yield from sorted(lanes | ({width // 2} if batch_size <= width else set()))


def _parts(graph: Graph, lanes: int | None, *, pairs: bool) -> Iterator[Part]:
    scratch = Scratch(numbers)
    for nodes in split(graph):
        if graph.nodes[nodes[0]].by_torch:
            yield TorchPart(graph, nodes)
        else:
            yield _kernel_part(graph, nodes, lanes, scratch, pairs=pairs)


def _kernel_part(graph: Graph, nodes: list[int], lanes: int | None, scratch: Scratch, *, pairs: bool) -> KernelPart:
    if lanes is None:
        return MapPart(graph, nodes, pairs=pairs)
    return RowPart(graph, nodes, lanes, scratch, pairs=pairs)


class _Whole:
    """What torch computes of all of a graph one operation after the other, to hold other ways against."""

    def __init__(self, graph: Graph) -> None:
        self.plain = Program.by_torch(graph)
        self._given = random_inputs(_BATCH, graph.input_shapes)
        try:
            self._expected: list[Tensor] | None = self.plain.outputs(*_cloned(self._given))
        except RuntimeError:
            self._expected = None

    def difference(self, program: Program) -> float:
        """The largest; infinite if the program or torch fails, as a view of other strides would."""
        if self._expected is None:
            return inf
        try:
            return largest_difference(program.outputs(*_cloned(self._given)), self._expected)
        except RuntimeError:
            return inf

    def error(self, program: Program) -> Error | None:
        """Of all images together; None if torch fails."""
        if self._expected is None:
            return None
        ours = program.outputs(*_cloned(self._given))
        return error_of(*(torch.cat([x.flatten().float() for x in results]) for results in (ours, self._expected)))


def _cloned(tensors: list[Tensor]) -> list[Tensor]:
    """What calls may write to."""
    return [tensor.clone() for tensor in tensors]


class _Trials:
    """What torch computes of the engine's parts, to hold these against.

    The parts get inputs of their own: those that come through a network may all be zero.
    """

    def __init__(self, graph: Graph) -> None:
        self._trials: dict[tuple[int, ...], list[tuple[Values, Values]]] = {}
        for nodes in split(graph):
            if not graph.nodes[nodes[0]].by_torch:
                self._trials[tuple(nodes)] = [_trial(TorchPart(graph, nodes), batch) for batch in _BATCHES]

    def difference(self, program: Program) -> float:
        """The largest between a part's outputs and torch's."""
        largest = 0.0
        for part in program.parts:
            for inputs, expected in self._trials.get(tuple(part.nodes), []):
                values = dict(inputs)
                part.run(values)
                ours, theirs = ([found[position] for position in part.outputs] for found in (values, expected))
                largest = max(largest, largest_difference(ours, theirs))
        return largest


def _trial(part: TorchPart, batch: int) -> tuple[Values, Values]:
    """Inputs and outputs of a part."""
    inputs = _inputs_of(part, batch)
    values = dict(inputs)
    part.run(values)
    return inputs, {position: values[position] for position in part.outputs}


def _seconds(run: Callable[[], object], best: float) -> float:
    """How long `run` takes: the least of some times, of fewer if it can't be the `best`."""
    least, spent, attempt = inf, 0.0, 0
    while attempt < _REPEATS or spent < _SECONDS:
        started = time.perf_counter()
        run()
        taken = time.perf_counter() - started
        least, spent, attempt = min(least, taken), spent + taken, attempt + 1
        if attempt > 1 and spent > _SECONDS and least > _HOPELESS * best:
            break
    return least
