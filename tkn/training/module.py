"""The LightningModule: loss, scale penalty or budget, projection after every step, errors."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from math import ceil
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from tkn.adaptive import ImageRois, adaptive_layers
from tkn.budget import Budget
from tkn.data.base import Task
from tkn.decay import attention_parameters
from tkn.layers import clipped, roi_layers
from tkn.macs import MacsReport, count_macs
from tkn.models import Architecture
from tkn.models.freezing import frozen_norms
from tkn.penalty import kernel_costs, scale_penalty
from tkn.training.averaging import MovingAverage
from tkn.training.batches import Batches
from tkn.training.cuda_graphs import StepGraphs, supports_cuda_graphs
from tkn.training.recipe import build_optimizer, build_schedule

#: Looking at a loss waits for the GPU, so there only every so many steps.
_GPU_LOSS_CHECK_STEPS = 50


class Diverged(ValueError):
    """The loss is no longer a finite number."""


def batch_errors(output: Tensor, targets: Tensor, task: Task) -> dict[str, Tensor]:
    """A batch's mean loss and errors: {"loss", "error" (percent)} or {"loss", "mse", "mae"}.

    Softmax cross entropy for classification, squared (Euclidean) error for regression (Table 1).
    `output`: [B, outputs]; `targets`: [B] or [B, 1].
    """
    output = output.float()
    if task == "classification":
        wrong = output.argmax(dim=1) != targets
        return {"loss": F.cross_entropy(output, targets), "error": 100 * wrong.float().mean()}
    mse = F.mse_loss(output, targets)
    return {"loss": mse, "mse": mse.detach(), "mae": F.l1_loss(output, targets).detach()}


class MeanOverImages(Metric):
    """A mean over the images of an epoch, which a NaN makes NaN.

    torchmetrics' MeanMetric looks for NaNs in every step, which waits for a GPU; and where it is told not to
    (nan_strategy="disable") it forgets the weights, so that a last, smaller batch counts too much.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")

    def update(self, value: Tensor, count: int) -> None:
        """`value`: the mean over `count` more images."""
        self.total += value * count
        self.count += count

    def compute(self) -> Tensor:
        return self.total / self.count

    def sums(self) -> Tensor:
        """[2]: the total over all images so far, and their count."""
        return torch.stack((self.total, self.count))


def _means(names: list[str]) -> nn.ModuleDict:
    return nn.ModuleDict({name: MeanOverImages() for name in names})


class TargetedTraining(pl.LightningModule):
    """Trains a network, targeted or not.

    Args:
        model: [B, *input_size] -> [B, outputs].
        input_size: (C, H, W).
        task: "classification" or "regression".
        eval_name: what the evaluation after every epoch is on, "valid" or "test".
        penalty: `l2` and `beta` of the scale penalty, `start` and `end`, the fractions of the run between which it
            acts, and `costs` (see `scale_penalty`); or the budget's `share` or `macs`, and `reach`, the fraction of the
            run after which it is met.
        recipe: optimizer, weight_decay_as and the schedule's keys (Sec. 4.2), attention_lr_factor, label_smoothing,
            ema_decay.
        identity: plain data that tells what a checkpoint is of (see `tkn.training.records.checkpoint`).
        frozen: names or patterns of what does not learn (see `freeze_`), whose normalisations then keep their
            statistics too.
        pretrained, pretrained_lr_factor: the names of parameters that learn at so many times the rate; None: at the
            rate.
        cuda_graphs: on a CUDA GPU, start the kernels of the forward and backward pass at once; for one process only.
    """

    def __init__(
        self,
        model: nn.Module,
        input_size: tuple[int, int, int],
        *,
        task: Task,
        eval_name: str,
        penalty: dict[str, Any],
        recipe: dict[str, Any],
        identity: dict[str, Any],
        frozen: Sequence[str] = (),
        pretrained: Collection[str] = (),
        pretrained_lr_factor: float | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        super().__init__()
        #: what is evaluated, counted and saved as the result
        self.model = model
        #: what learns, if `model` is its moving average
        self.raw = copy.deepcopy(model) if recipe["ema_decay"] else None
        self.input_size = input_size
        self.task: Task = task
        self.eval_name = eval_name
        self.penalty = penalty
        self._costs = kernel_costs(model, input_size) if penalty.get("costs") else None
        self.recipe = recipe
        self.identity = identity
        self.frozen = frozen
        self.pretrained = pretrained
        self.pretrained_lr_factor = 1.0 if pretrained_lr_factor is None else pretrained_lr_factor
        self._learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.cuda_graphs = cuda_graphs
        self._forget_tensors()
        #: what adaptive layers came to in the last evaluation
        self.image_rois: ImageRois | None = None
        counted = self.count_macs()
        #: multiply-adds inside the ROIs as of the last epoch's last step
        self.macs_roi = counted.total_roi
        self.map_sizes = {row.name: row.map_size for row in counted.target_layers}
        #: the layers whose ROIs learn
        self._moving = [name for name in self.map_sizes if self._moves(name)]
        #: what holds the network to its multiply-adds
        self.budget = self._budget() if "reach" in penalty else None
        #: only one of two errors is that of the network as it is counted
        self.soft = any(not layer.clip for layer in roi_layers(model).values())
        names = ["loss", *self.error_names]
        self.train_means = _means(names)
        self.eval_means = _means([*names, *(f"{name}_clipped" for name in self.error_names)])
        self.project()

    @property
    def architecture(self) -> Architecture:
        """What network it is."""
        return Architecture.from_dict(self.identity["architecture"])

    @property
    def error_names(self) -> tuple[str, ...]:
        """The first is the one to minimise."""
        return ("error",) if self.task == "classification" else ("mse", "mae")

    @property
    def monitor(self) -> str:
        """The metric, evaluated after every epoch, by which the best epoch is chosen."""
        return f"{self.eval_name}/{self.error_names[0]}"

    @property
    def learning(self) -> nn.Module:
        """The network that the optimiser changes."""
        return self.model if self.raw is None else self.raw

    def mean(self, split: str, name: str) -> MeanOverImages:
        """The running mean of the metric `name` over this epoch of "train", or of the evaluation."""
        mean = (self.train_means if split == "train" else self.eval_means)[name]
        assert isinstance(mean, MeanOverImages)
        return mean

    def _budget(self) -> Budget:
        try:
            return Budget(self.learning, self.input_size, share=self.penalty["share"], macs=self.penalty["macs"])
        except ValueError as error:
            raise ValueError(f"penalty=budget: {error}") from error

    def may_be_best(self, row: Mapping[str, float]) -> bool:
        """Whether an epoch's network, of which `row` is, may be chosen as the best one: it meets the budget."""
        return self.budget is None or self.budget.allows(row["macs_roi"])

    def count_macs(self) -> MacsReport:
        """The network's multiply-adds for one image, now; of adaptive layers the mean over the last evaluation."""
        return count_macs(self.model, self.input_size, self.image_rois)

    def project(self) -> None:
        """Clip loc and scale of every layer that runs and learns them to valid ROIs (Sec. 3.5)."""
        layers = roi_layers(self.learning)
        for name in self._moving:
            layers[name].project_(self.map_sizes[name])

    def _moves(self, name: str) -> bool:
        """Whether the ROIs of this layer learn."""
        layer = roi_layers(self.model)[name]
        return any(layer.get_parameter(parameter).requires_grad for parameter in layer.no_weight_decay())

    def _follow_step(self) -> None:
        """What a step of the optimiser needs after it, on the device."""
        if self.budget is not None:
            self.budget.apply()
        else:
            self.project()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def _forget_tensors(self) -> None:
        """Let go of what holds tensors at the places that they have in training."""
        self._average: MovingAverage | None = None
        self._graphs: StepGraphs | None = None
        #: whether the graphs compute the present step
        self._replayed = False

    def on_train_start(self) -> None:
        for norm in frozen_norms(self.learning, self.frozen):
            norm.eval()
        # From now on the tensors stay where they are.
        if self.raw is not None:
            # An average of ROIs would not have the budget's multiply-adds.
            copied = attention_parameters(self.raw) if self.budget is not None else ()
            self._average = MovingAverage(self.model, self.raw, self.recipe["ema_decay"], copied)
        if self.cuda_graphs and supports_cuda_graphs(self.device):
            self._graphs = StepGraphs(self._losses, self._follow_step, self._parameters_that_learn())
        if self.budget is not None:
            self._plan(self.budget)

    def _parameters_that_learn(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.learning.parameters() if parameter.requires_grad]

    def _plan(self, budget: Budget) -> None:
        """Begin or continue the budget's plan: also that of a run that goes on without one, or with another one."""
        steps, done = max(1, round(self.penalty["reach"] * self._total_steps)), self.trainer.global_step
        if budget.done == done and (budget.met or budget.steps == steps):
            return
        if done >= steps:
            raise ValueError(
                f"penalty.reach={self.penalty['reach']} is after {steps} steps, but the run goes on after {done}: "
                "a budget needs steps in which the ROIs shrink"
            )
        budget.begin(done, steps)

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.raw is not None:
            self.model.requires_grad_(False)  # several processes would wait for its gradients

    def teardown(self, stage: str) -> None:
        self._forget_tensors()
        if stage == "fit" and self.raw is not None:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(self._learns[name])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tkn"] = self.identity
        if self.budget is not None:
            checkpoint["budget"] = self.budget.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("budget")
        if self.budget is not None and state is not None and state["macs"] == self.budget.macs:
            self.budget.load_state_dict(state)

    def train_sums(self) -> dict[str, Tensor]:
        """The sums behind the means of this epoch so far, over all processes: those of an epoch that is saved."""
        return {name: self.trainer.strategy.reduce(mean.sums(), reduce_op="sum") for name, mean in self._train_means()}

    def set_train_sums(self, sums: dict[str, Tensor]) -> None:
        """Go on from saved sums."""
        # One process has the sums of all.
        share = float(self.trainer.is_global_zero)
        for name, mean in self._train_means():
            mean.total, mean.count = (share * sums[name]).to(self.device)

    def _train_means(self) -> Iterator[tuple[str, MeanOverImages]]:
        return ((name, self.mean("train", name)) for name in ("loss", *self.error_names))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor | None:
        count = len(batch[1])
        penalised = self._penalised()
        losses = None
        if self._graphs is not None and count == self.trainer.datamodule.batch_size:  # type: ignore[attr-defined]
            losses = self._graphs.step(batch, penalised)
        self._replayed = losses is not None
        if losses is None:
            losses = self._losses(*batch, penalised, self._weight(count, batch_index))
        total = losses["total"]
        if self.device.type == "cpu" or batch_index % _GPU_LOSS_CHECK_STEPS == 0:  # the epoch's mean is checked too
            self._require_finite(total)
        self._log("train", {name: losses[name] for name, _ in self._train_means()}, count)
        return None if self._replayed else total

    def _losses(self, x: Tensor, targets: Tensor, penalised: bool, weight: float = 1.0) -> dict[str, Tensor]:
        """The batch's errors, and "total", which is minimised."""
        output = self.learning(x)
        errors = batch_errors(output, targets, self.task)
        total = errors["loss"]
        if self.recipe["label_smoothing"]:
            total = F.cross_entropy(output.float(), targets, label_smoothing=self.recipe["label_smoothing"])
        total = weight * total
        if penalised:
            total = total + scale_penalty(self.learning, self.penalty["l2"], self.penalty["beta"], self._costs)
        return {"total": total, **errors}

    def _penalised(self) -> bool:
        """Whether this step is in the part of the run in which the scale penalty acts."""
        if self.budget is not None:
            return False
        steps = self._total_steps
        return bool(self.penalty["start"] * steps <= self.trainer.global_step < self.penalty["end"] * steps)

    def _weight(self, count: int, batch_index: int) -> float:
        """What a process's mean over `count` images weighs, so that the processes' mean is that over all images."""
        if self.trainer.world_size == 1:
            return 1.0
        batches = self.trainer.train_dataloader
        assert isinstance(batches, Batches)
        return count * self.trainer.world_size / batches.images(batch_index)

    def _require_finite(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            options = [f"recipe.optimizer.lr={self.recipe['optimizer'].get('lr')}"]
            options += [f"penalty.l2={self.penalty['l2']}"] if self.budget is None else []
            raise Diverged(
                f"the training loss became {loss.item()} in epoch {self.current_epoch + 1}: "
                f"lower {' or '.join(options)}"
            )

    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        # Lightning clears the gradients after `training_step`, where the graph has just made them.
        if not self._replayed:
            super().optimizer_zero_grad(*args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.budget is not None:
            self.budget.advance()
        if self._graphs is not None:
            held = self.budget is not None and self.budget.held
            # Without ROIs that learn nothing is captured.
            self._graphs.project(captured=self._replayed and bool(self._moving), held=held)
        else:
            self._follow_step()
        if self._average is not None:
            # The trainer counts the step when this hook is done.
            self._average.update(self.trainer.global_step + 1)

    def on_validation_start(self) -> None:
        self._share_buffers()
        self._watch_rois()

    def on_test_start(self) -> None:
        self._share_buffers()
        self._watch_rois()

    def on_validation_end(self) -> None:
        self._watched_rois()

    def on_test_end(self) -> None:
        self._watched_rois()

    def _watch_rois(self) -> None:
        """Let the evaluation that begins say what adaptive layers come to."""
        self.image_rois = ImageRois(self.model).__enter__() if adaptive_layers(self.model) else None

    def _watched_rois(self) -> None:
        if self.image_rois is not None:
            self.image_rois.__exit__(None, None, None)
            self.macs_roi = self.count_macs().total_roi

    def _share_buffers(self) -> None:
        """Evaluate what the first process saves: each has batch normalisation's running means of its own images."""
        if self.trainer.world_size > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def validation_step(self, batch: tuple[Tensor, Tensor], _batch_index: int) -> None:
        self._evaluate(self.eval_name, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], _batch_index: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: tuple[Tensor, Tensor]) -> None:
        x, targets = batch
        self._log(split, batch_errors(self.model(x), targets, self.task), len(x))
        if self.soft:
            with clipped(self.model):
                errors = batch_errors(self.model(x), targets, self.task)
            self._log(split, {f"{name}_clipped": errors[name] for name in self.error_names}, len(x))

    def _log(self, split: str, errors: dict[str, Tensor], count: int) -> None:
        for name, value in errors.items():
            metric = self.mean(split, name)
            metric.update(value.detach(), count)
            self.log(f"{split}/{name}", metric, on_step=False, on_epoch=True)

    def check_epoch(self) -> None:
        """`Diverged` if the loss of any step of this epoch so far was not finite, also of those not looked at."""
        self._require_finite(self.mean("train", "loss").compute())

    def on_validation_epoch_start(self) -> None:
        # All training steps of the epoch are done; its end comes after the callbacks that need this.
        self.check_epoch()
        self.macs_roi = self.count_macs().total_roi

    def configure_optimizers(self) -> Any:
        recipe, epochs = self.recipe, self.trainer.max_epochs
        optimizer = build_optimizer(
            self.learning,
            recipe["optimizer"],
            recipe["weight_decay_as"],
            recipe["attention_lr_factor"],
            self.pretrained,
            self.pretrained_lr_factor,
        )
        assert epochs is not None
        schedule = build_schedule(optimizer, recipe, epochs, self._epoch_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def _total_steps(self) -> int:
        """The optimiser's steps in the run."""
        assert self.trainer.max_epochs is not None
        return self.trainer.max_epochs * self._epoch_steps

    @cached_property
    def _epoch_steps(self) -> int:
        """The optimiser's steps in an epoch.

        The trainer's own estimate would set up its loader before a continued run's place in it is known.
        """
        datamodule, limit = self.trainer.datamodule, self.trainer.limit_train_batches  # type: ignore[attr-defined]
        available = datamodule.train_batches
        batches = min(available, limit) if isinstance(limit, int) else int(available * limit)
        if batches == 0:
            raise ValueError(f"trainer.limit_train_batches={limit} of {available} batches leaves none to train on")
        return ceil(batches / self.trainer.accumulate_grad_batches)
