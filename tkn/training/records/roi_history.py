"""rois.npz: where every kernel's region of interest was after every epoch, for pictures of how they moved (Fig. 4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from tkn.app.files import whole_file
from tkn.layers import roi_layers
from tkn.training.module import TargetedTraining


class RoiHistory(Callback):
    """Every target layer's `loc` and `scale` at the start (epoch 0) and after every epoch.

    The file has, for N recorded epochs, "epochs" int64 [N], and for each layer, in the network's order, "<layer>.loc"
    and "<layer>.scale" float32 [N, 2, C] and "<layer>.size" int64 [2], the map's height and width. It is rewritten
    whole after every epoch; the checkpoints carry it along. A model without target layers leaves no file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[int, dict[str, Tensor]] = {}

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not self.records:
            self._record(0, module)
        elif trainer.is_global_zero:  # of the run that is continued
            self._write(module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._record(trainer.current_epoch + 1, module)
        if trainer.is_global_zero:
            self._write(module)

    def _record(self, epoch: int, module: pl.LightningModule) -> None:
        assert isinstance(module, TargetedTraining)
        self.records[epoch] = {
            f"{name}.{parameter}": getattr(layer, parameter).detach().float().cpu().clone()
            for name, layer in roi_layers(module.model).items()
            for parameter in ("loc", "scale")
        }

    def _write(self, module: pl.LightningModule) -> None:
        assert isinstance(module, TargetedTraining)
        if not module.map_sizes:
            return
        arrays: dict[str, np.ndarray] = {"epochs": np.array(list(self.records), dtype=np.int64)}
        for key in self.records[0]:
            arrays[key] = torch.stack([record[key] for record in self.records.values()]).numpy()
        for name, size in module.map_sizes.items():
            arrays[f"{name}.size"] = np.array(size, dtype=np.int64)
        with whole_file(self.path) as temporary:
            np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        return {"records": self.records}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.records = dict(state_dict["records"])
