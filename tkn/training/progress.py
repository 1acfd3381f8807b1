"""The progress bar of a run in a terminal."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar

from tkn.training.module import TargetedTraining


class ProgressBar(RichProgressBar):
    """A bar an epoch with loss and error so far, the last evaluation's error, multiply-adds; it stays on the screen."""

    def __init__(self) -> None:
        # Reading the means waits for a GPU, so not at every step.
        super().__init__(refresh_rate=10, leave=True)

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        assert isinstance(pl_module, TargetedTraining)
        error = pl_module.error_names[0]
        shown: dict[str, int | str | float | dict[str, float]] = {}
        for name in ("loss", error):
            total, count = pl_module.mean("train", name).sums().tolist()  # of this process: the others show nothing
            if count:
                shown[name] = f"{total / count:.3f}"
        evaluated = pl_module.monitor
        if evaluated in trainer.callback_metrics:
            shown[evaluated] = f"{trainer.callback_metrics[evaluated].item():.3f}"
        return {**shown, "MACs": f"{pl_module.macs_roi / 1e6:.4g}M"}
