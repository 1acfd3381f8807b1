"""A plan held against the network that it was made of, on test images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tkn.data.base import DataSet, Split, Task
from tkn.export.interval import Estimate, of_mean, of_share
from tkn.plan.compare import random_images

#: Images computed at once.
_BATCH = 128

#: Batches of inputs [B, C, H, W] and of targets.
Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Images:
    """What a plan is checked on. task: None of images without targets; source: what they are, for people."""

    batches: Batches
    count: int
    task: Task | None
    source: str


def random_batch(input_size: tuple[int, ...]) -> Images:
    """Images of random numbers, which have no targets."""
    inputs = random_images(_BATCH, input_size)
    return Images(lambda: iter([(inputs, torch.zeros(len(inputs)))]), len(inputs), None, "random numbers")


def test_images(data: DataSet, count: int | None) -> Images:
    """A data set's test images: all, or so many that lie evenly in their order."""
    whole = len(data.test)
    if count is not None and count > whole:
        raise ValueError(f"--images {count}: {data.name} has {whole:,} test images")
    split = data.test if count in (None, whole) else data.test.select(torch.arange(count) * whole // count)
    return Images(lambda: _batches(data, split), len(split), data.task, data.source)


def _batches(data: DataSet, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(split), _BATCH):
        part = split.select(slice(start, start + _BATCH))
        yield data.inputs(part), part.targets


@dataclass(frozen=True)
class Outcome:
    """What a network or a plan came to on images.

    errors: "error" in percent, or "mse" and "mae"; none without targets. difference: the largest of the outputs from
    the network's, as a part of the network's largest output; absolute: the same in numbers; others: images whose class
    is another than the network's, None where there are no classes.
    """

    errors: Mapping[str, Estimate]
    difference: float = 0.0
    absolute: float = 0.0
    others: int | None = None


def outcomes(network: nn.Module, plans: Mapping[int, nn.Module], images: Images) -> tuple[Outcome, dict[int, Outcome]]:
    """The network's outcome, and that of each plan; all on the same images, clipped to the ROIs."""
    expected: list[Tensor] = []
    found: dict[int, list[Tensor]] = {key: [] for key in plans}
    targets: list[Tensor] = []
    with torch.inference_mode():
        for inputs, wanted in images.batches():
            expected.append(network(inputs).float())
            targets.append(wanted)
            for key, plan in plans.items():
                found[key].append(plan(inputs).float())
    truth, target = torch.cat(expected), torch.cat(targets)
    network_outcome = Outcome(_errors(truth, target, images.task))
    return network_outcome, {
        key: _outcome(torch.cat(parts), truth, target, images.task) for key, parts in found.items()
    }


def _outcome(outputs: Tensor, truth: Tensor, targets: Tensor, task: Task | None) -> Outcome:
    absolute = float((outputs - truth).abs().max())
    largest = float(truth.abs().max())
    classes = task == "classification"
    others = int((outputs.argmax(1) != truth.argmax(1)).sum()) if classes else None
    return Outcome(_errors(outputs, targets, task), absolute / largest if largest else absolute, absolute, others)


def _errors(outputs: Tensor, targets: Tensor, task: Task | None) -> dict[str, Estimate]:
    if task is None:
        return {}
    if task == "classification":
        return {"error": of_share(outputs.argmax(1) != targets)}
    apart = (outputs - targets).flatten()
    return {"mse": of_mean(apart.square()), "mae": of_mean(apart.abs())}
