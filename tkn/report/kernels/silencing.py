"""What a network loses without one of its kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tkn.data.base import Task
from tkn.layers import RoiLayer
from tkn.report.kernels.hooks import Change, hooked_outputs
from tkn.report.kernels.places import kernel_count
from tkn.report.kernels.rerun import Rerun
from tkn.report.kernels.responses import BATCH
from tkn.training.module import batch_errors

#: Of a layer with more kernels so many are silenced.
CANDIDATES = 16
#: Images of which the choice of these is made.
_CHOSEN_ON = 256


@dataclass(frozen=True)
class Rise:
    """By how much the test error (percentage points, or a regression's mean squared error) and the loss rise."""

    error: float
    loss: float


def importance(rise: Rise) -> tuple[float, float]:
    """What kernels are sorted by, the most important first."""
    return -rise.error, -rise.loss


def silencing_rises(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    task: Task,
    layers: Mapping[str, RoiLayer],
    say: Callable[[str], None] = lambda _layer: None,
) -> dict[str, dict[int, Rise]]:
    """For each of the model's layers the `Rise` of its kernels, each silenced alone, the largest first.

    Silenced: the kernel's channel of the layer's output is zero. images: [N, C, H, W]. Of a layer of more than
    `CANDIDATES` kernels those are silenced of which `expected_changes` are largest. say: is told each layer's name
    before its kernels are silenced.
    """
    with torch.no_grad():
        before = _errors([model(batch) for batch in images.split(BATCH)], targets, task)
    step = max(1, len(images) // _CHOSEN_ON)
    large = {name: layer for name, layer in layers.items() if kernel_count(layer) > CANDIDATES}
    expected = expected_changes(model, images[::step], targets[::step], task, large)
    found = {}
    for name, layer in layers.items():
        say(name)
        chosen = expected[name].topk(CANDIDATES)[1].tolist() if name in expected else range(kernel_count(layer))
        rerun = Rerun(model, layer, images)
        batches = [rerun(batch, [partial(_without, kernel) for kernel in chosen]) for batch in images.split(BATCH)]
        rises = {}
        for kernel, outputs in zip(chosen, zip(*batches, strict=True), strict=True):
            after = _errors(outputs, targets, task)
            rises[kernel] = Rise(after.error - before.error, after.loss - before.loss)
        found[name] = dict(sorted(rises.items(), key=lambda item: importance(item[1])))
    return found


def expected_changes(
    model: nn.Module, images: Tensor, targets: Tensor, task: Task, layers: Mapping[str, RoiLayer]
) -> dict[str, Tensor]:
    """For each layer [C], how much silencing a kernel would change the loss if that were linear in the layer's output.

    The mean over the images of |sum over the pixels of output x gradient| (after Molchanov et al.,
    Pruning Convolutional Neural Networks for Resource Efficient Inference, 2017).
    """
    sums: dict[str, list[Tensor]] = {name: [] for name in layers}
    if not layers:
        return {}
    for batch, wanted in zip(images.split(BATCH), targets.split(BATCH), strict=True):
        kept: dict[str, Tensor] = {}
        with ExitStack() as stack, torch.enable_grad():
            for name, layer in layers.items():
                stack.enter_context(hooked_outputs(layer, _keeper(kept, name)))
            loss = batch_errors(model(batch), wanted, task)["loss"] * len(batch)
            gradients = torch.autograd.grad(loss, list(kept.values()))
        for (name, output), gradient in zip(kept.items(), gradients, strict=True):
            sums[name].append((output.detach() * gradient).sum(dim=(2, 3)).abs())
    return {name: torch.cat(parts).mean(dim=0) for name, parts in sums.items()}


def _keeper(kept: dict[str, Tensor], name: str) -> Change:
    def keep(output: Tensor) -> Tensor:
        kept[name] = output
        return output.clone()  # a ReLU may write over it

    return keep


def _without(kernel: int, output: Tensor) -> Tensor:
    silenced = output.clone()
    silenced[:, kernel] = 0
    return silenced


def _errors(outputs: Sequence[Tensor], targets: Tensor, task: Task) -> Rise:
    """Of the outputs of all batches."""
    errors = batch_errors(torch.cat(list(outputs)), targets, task)
    return Rise(float(errors["error" if task == "classification" else "mse"]), float(errors["loss"]))
