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
from tkn.plan.compare import TOLERANCE, TOLERANCES, Error, difference, error_of, random_images
from tkn.plan.folded import folded
from tkn.plan.graph import Convolve, Graph, Pooling
from tkn.plan.neighbours import with_neighbours
from tkn.plan.parts import MapPart, Part, Program, RowPart, Scratch, TorchPart, Values, numbers, split, torch_shape
from tkn.plan.ready import plans_run

#: Up to this batch size vectors may go over the pixels or channels of one image: whichever is faster.
_SMALL = 16
#: Arrangements are timed on so many images at most.
_MOST_IMAGES = 256
#: Vectors over the images are not tried where so many of their numbers, or more, would be of none.
_EMPTY = 8
#: Each way is timed so many times at least, and for so many seconds: threads that slept are slow at first.
_REPEATS, _SECONDS = 3, 0.02
#: What takes so many times as long as another way is not timed again.
_HOPELESS = 1.5
#: Numbers of activations and taps for which lists are made; they take about a hundred bytes each.
_MOST_LISTED = 2**27
#: The batches on which parts are compared with torch.
_BATCHES = (2, 5)


def arranged(graph: Graph, batch_size: int, small: bool | None = None, *, pairs: bool = False) -> Program:
    """The fastest right way to compute batches of `batch_size`; by torch, after a warning, if the engine can't.

    `small`: with vectors over one image (True) or over several (False); by default whichever is faster, or torch if it
    is faster than both. `pairs`: the engine multiplies pairs of bfloat16 where that is faster.
    """
    whole = _Whole(graph)
    program = _fastest(_ways(graph, batch_size, small, whole, pairs=pairs), graph, batch_size)
    program.error = whole.error(program)
    return program


def _ways(graph: Graph, batch_size: int, small: bool | None, whole: _Whole, *, pairs: bool) -> list[Program]:
    by_torch = _by_torch(graph, whole)
    if not (available(torch.float32) and plans_run()):
        return by_torch
    if _list_numbers(graph) > _MOST_LISTED:
        warnings.warn(f"torch runs the plan: images of {graph.input_size} are too large for the engine", stacklevel=3)
        return by_torch
    programs, wrong = _by_kernels(graph, batch_size, small, whole, pairs=pairs)
    if not programs and wrong:
        warnings.warn(f"torch runs the plan: {wrong[0]}", stacklevel=3)
    return programs + (by_torch if small is None or not programs else [])


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
    tolerance = TOLERANCES[torch.bfloat16 if pairs else torch.float32]
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
        if differs <= tolerance:
            programs.append(program)
            if lanes is None and batch_size < torch.get_num_threads():
                programs.append(_on_one_thread(program))
        else:
            wrong.append(f"the engine's result differs by {differs:.1e}")
    return programs, wrong


def _on_one_thread(program: Program) -> Program:
    """The same of maps: where layers are small, threads that wait for each other's numbers can take longer."""
    parts = [part.on_one_thread() if isinstance(part, MapPart) else part for part in program.parts]
    return Program(program.graph, parts, f"{program.way}, one thread")


def _fastest(programs: list[Program], graph: Graph, batch_size: int) -> Program:
    if len(programs) == 1:
        return programs[0]
    shape = (min(batch_size, _MOST_IMAGES), *graph.input_size)
    images = torch.zeros(shape, dtype=torch.float32, device="cpu")
    seconds: list[float] = []
    for program in programs:
        seconds.append(_seconds(partial(program, images), min(seconds, default=inf)))
    order = sorted(range(len(programs)), key=seconds.__getitem__)
    fastest = programs[order[0]]
    fastest.timings = {programs[i].way: seconds[i] for i in order}
    return fastest


def _way(lanes: int | None, parts: list[Part]) -> str:
    images = "one image" if lanes is None else f"{lanes} images"
    return f"vectors over {images}{', bfloat16' if any(part.paired for part in parts) else ''}"


def _list_numbers(graph: Graph) -> int:
    """How many numbers of activations and taps of output pixels the lists of a graph would hold."""
    count = 0
    for node in graph.nodes:
        if node.size is not None and not node.by_torch:
            count += prod(node.size)
        if isinstance(node.operation, Convolve | Pooling):
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
            yield (
                MapPart(graph, nodes, pairs=pairs)
                if lanes is None
                else RowPart(graph, nodes, lanes, scratch, pairs=pairs)
            )


class _Whole:
    """What torch computes of all of a graph one operation after the other, to hold other ways against."""

    def __init__(self, graph: Graph) -> None:
        self.plain = Program.by_torch(graph)
        images = [random_images(batch, graph.input_size) for batch in _BATCHES]
        try:
            self._results: list[tuple[Tensor, Tensor]] | None = [(x, self.plain(x.clone())) for x in images]
        except RuntimeError:
            self._results = None

    def difference(self, program: Program) -> float:
        """The largest; infinite if the program or torch fails, as a view of other strides would."""
        if self._results is None:
            return inf
        try:
            return max(difference(program(x.clone()), expected) for x, expected in self._results)
        except RuntimeError:
            return inf

    def error(self, program: Program) -> Error | None:
        """Of all images together; None if torch fails."""
        if self._results is None:
            return None
        ours = torch.cat([program(x.clone()) for x, _ in self._results])
        return error_of(ours, torch.cat([expected for _, expected in self._results]))


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
                differences = [difference(values[position], expected[position]) for position in part.outputs]
                largest = max(largest, *differences)
        return largest


def _trial(part: TorchPart, batch: int) -> tuple[Values, Values]:
    """Inputs and outputs of a part."""
    inputs: Values = {
        position: 2 * random_images(batch, torch_shape(part.graph, position), seed=position) - 1
        for position in part.inputs
    }
    values = dict(inputs)
    part.run(values)
    return inputs, {position: values[position] for position in part.outputs}


def _seconds(run: Callable[[], object], best: float) -> float:
    """How long `run` takes: the least of some times, of fewer if it can't be the `best`."""
    least, spent, attempt = inf, 0.0, 0
    while attempt <= _REPEATS or spent < _SECONDS:
        started = time.perf_counter()
        run()
        taken = time.perf_counter() - started
        least, spent, attempt = min(least, taken), spent + taken, attempt + 1
        if attempt > 1 and spent > _SECONDS and least > _HOPELESS * best:
            break
    return least
