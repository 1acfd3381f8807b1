"""A plan with what its file says of images and classes."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tkn.data.preparation import Preparation
from tkn.plan.plan import Plan, load_plan


class Predictor:
    """A plan that takes image files.

    classes: the names of the outputs, by index; empty of a regression, and where the file has no names.
    """

    def __init__(self, path: Path, batch_size: int, dtype: torch.dtype = torch.float32) -> None:
        """`batch_size`, `dtype`: as `load_plan`'s.

        FileNotFoundError; ValueError, with the file's name, for a file that is no plan, does not say how an image
        becomes its input, or says something that can't be.
        """
        self.path = path
        self.plan: Plan = load_plan(path, batch_size=batch_size, dtype=dtype)
        self.preparation = self._preparation()
        self.classes = self._classes()

    def _preparation(self) -> Preparation:
        content = self.plan.preprocessing
        if content is None:
            raise ValueError(
                f"{self.path} does not say how an image becomes its input: tkn-export writes that for networks that "
                "need nothing but an image, as does tkn.accelerate with "
                "preprocessing=tkn.data.preparation.Preparation(...).to_dict()"
            )
        try:
            preparation = Preparation.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        if preparation.input_size != self.plan.input_size:
            raise ValueError(
                f"{self.path} prepares images of {preparation.input_size}, but its network takes {self.plan.input_size}"
            )
        return preparation

    def _classes(self) -> tuple[str, ...]:
        names = [] if self.plan.classes is None else self.plan.classes
        valid = isinstance(names, list) and all(isinstance(name, str) and name.isprintable() for name in names)
        if not valid or len(set(names)) < len(names):
            raise ValueError(f"{self.path}: its classes must be a list of different printable names")
        return tuple(names)

    def prepare(self, image: Image.Image) -> Tensor:
        """The network's input, float32 [C, H, W]. ValueError for an image that it can't be made of."""
        return self.preparation(image)

    def outputs(self, inputs: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, outputs]: probabilities of the classes, or the one number of a regression.

        ValueError if the plan gives something else.
        """
        results = self.plan(inputs)
        if not isinstance(results, Tensor) or results.dim() != 2:
            raise ValueError(f"{self.path} gives something else than one row of numbers an image")
        count = results.shape[1]
        if self.classes and len(self.classes) != count:
            raise ValueError(f"{self.path} has {len(self.classes)} names of classes for {count} outputs")
        return results if self.is_regression(count) else results.softmax(dim=1)

    def is_regression(self, outputs: int) -> bool:
        """Whether a network of so many outputs tells a number, not a class."""
        return outputs == 1 and not self.classes

    def name(self, index: int) -> str:
        """Of a class."""
        return self.classes[index] if self.classes else str(index)
