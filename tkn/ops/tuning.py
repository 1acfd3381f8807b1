"""`tkn.tune`: measures, for a model's target layers, which engine is faster, and keeps it for `engine="auto"`."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from tkn.ops import eager, segments, tuned
from tkn.ops.engines import Backend
from tkn.ops.segments import Call, Segment
from tkn.spec import Target

_ROUNDS = 5


@dataclass(frozen=True)
class Tuned:
    """One sequence of target layers: their names, the engine of each, and the seconds of what was tried, best first."""

    layers: tuple[str, ...]
    engines: tuple[str, ...]
    seconds: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        chosen = ", ".join(f"{layer}: {engine}" for layer, engine in zip(self.layers, self.engines, strict=True))
        tried = ", ".join(f"{what} {taken * 1e3:.3g} ms" for what, taken in self.seconds)
        return f"{chosen} ({tried})"


@dataclass(frozen=True)
class _Seen:
    """A call of the operator with engine "auto"."""

    x: Tensor
    targets: tuple[Target, ...]
    backend: Backend
    fourier: bool
    call: Call


@contextmanager
def _seeing() -> Iterator[list[_Seen]]:
    """Within the context the calls that must choose are noted."""
    seen: list[_Seen] = []
    before = segments.observer

    def observe(x: Tensor, targets: Sequence[Target], backend: Backend, fourier: bool, call: Call) -> None:
        seen.append(_Seen(x.detach(), tuple(targets), backend, fourier, call))

    segments.observer = observe
    try:
        yield seen
    finally:
        segments.observer = before


def tune(model: nn.Module, batch_size: int, input_size: tuple[int, ...], *, training: bool = False) -> list[Tuned]:
    """Measure which engine is faster for each target layer of `model` whose engine is "auto", and keep that.

    The model runs once on a random batch of `input_size` (C, H, W), as it is now: with its ROIs, number of threads,
    memory format, and within autocast if this is called there. `training`: forward and backward, in training mode. What
    was found holds for ROIs of about this size, on this machine, also in later processes. Nothing else should run
    meanwhile. The model itself stays as it is. ValueError for a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    model = copy.deepcopy(model).train(training)
    like = next(model.parameters(), torch.zeros(()))
    x = torch.rand(batch_size, *input_size, dtype=like.dtype, device=like.device)
    with _seeing() as seen, torch.set_grad_enabled(training):
        model(x)
    names = {id(parameter): name.rpartition(".")[0] for name, parameter in model.named_parameters()}
    results: list[Tuned] = []
    measured: dict[str, dict[tuple[bool, ...], float]] = {}
    for call in seen:
        key = tuned.key_of(_works(call))
        if key not in measured:
            measured[key] = _measured(call)
        times = measured[key]
        best = min(times, key=times.__getitem__)
        tuned.keep({key: list(best)})
        layers = tuple(names.get(id(target.weight), "") or "(model)" for target in call.targets)
        tried = sorted((taken, _described(flags)) for flags, taken in times.items())
        engines = tuple("roi" if flag else "dense" for flag in best)
        results.append(Tuned(layers, engines, tuple((what, taken) for taken, what in tried)))
    return results


def _works(call: _Seen) -> list[segments.Work]:
    return segments.works_of(tuple(call.x.shape), call.targets, call.call, call.fourier)


def _described(flags: tuple[bool, ...]) -> str:
    if len(set(flags)) == 1:
        return "roi" if flags[0] else "dense"
    return "+".join("roi" if flag else "dense" for flag in flags)


def _measured(call: _Seen) -> dict[tuple[bool, ...], float]:
    """Seconds of the candidates, in turns: all layers densely, all inside their ROIs, and what only one layer changes
    of the better of these."""
    possible = tuple(target.spec.clip for target in call.targets)
    times = _in_turns(call, {(False,) * len(possible), possible})
    best = min(times, key=times.__getitem__)
    others = {
        tuple(not flag if i == position else flag for i, flag in enumerate(best))
        for position in range(len(best))
        if possible[position]
    } - set(times)
    if others:
        times |= _in_turns(call, others | {best})
    return times


def _in_turns(call: _Seen, candidates: set[tuple[bool, ...]]) -> dict[tuple[bool, ...], float]:
    runs = {flags: _run(call, segments.joined(call.targets, flags, call.backend, "")) for flags in sorted(candidates)}
    taken: dict[tuple[bool, ...], list[float]] = {flags: [] for flags in runs}
    for turn in range(1 + _ROUNDS):
        for flags, run in runs.items():
            _finish(call.x)
            started = time.perf_counter()
            run()
            _finish(call.x)
            if turn > 0:  # the first makes lists and windows
                taken[flags].append(time.perf_counter() - started)
    return {flags: median(times) for flags, times in taken.items()}


def _finish(x: Tensor) -> None:
    """Wait for what the device of x still computes."""
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def _run(call: _Seen, made: list[Segment]) -> Callable[[], None]:
    x = call.x.clone(memory_format=torch.preserve_format).requires_grad_(call.call.needs_x)
    tensors = [t for target in call.targets for t in target.tensors]
    wanted = [t for t in (x, *tensors) if t.requires_grad]

    def run() -> None:
        with torch.set_grad_enabled(call.call.training):
            with torch.autocast(
                x.device.type, call.call.dtype if call.call.autocast else None, enabled=call.call.autocast
            ):
                y = eager.compute(x, made, call.call, call.fourier)
            if call.call.training:
                torch.autograd.grad(y, wanted, torch.ones_like(y))

    return run
