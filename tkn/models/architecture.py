"""What network it is, as plain data: all that is needed to make it again, but for its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tkn.models import build
from tkn.models.factory import Factory
from tkn.models.widths import Widths, resize_
from tkn.ops.engines import Engine


@dataclass(frozen=True)
class Narrowed:
    """How a dense network was made narrower.

    by: "thin" (every width scaled) or "channels" (channels pruned); wanted: multiply-adds for one image; macs: those
    that it came to; baseline_macs: those of the whole network; widths: of the layers that changed.
    """

    by: str
    wanted: int
    macs: int
    baseline_macs: int
    widths: Widths


@dataclass(frozen=True)
class Architecture:
    """A network by its name and options.

    name, input_size, num_outputs, options: as for `build_model`; attention: attention, scale_unit and min_size of
    target layers. `to_dict` is plain data, which `torch.load(weights_only=True)` reads.
    """

    name: str
    input_size: tuple[int, int, int]
    num_outputs: int
    options: Mapping[str, Any] = field(default_factory=dict)
    attention: Mapping[str, Any] = field(default_factory=dict)
    narrowed: Narrowed | None = None

    @property
    def targeted(self) -> bool:
        """Whether it has target layers."""
        return build.is_targeted(self.name, self.options)

    @property
    def base_title(self) -> str:
        """What tables call the dense network that it is made of; its own title if it is one."""
        return build.dense_title(self.name, self.options)

    @property
    def title(self) -> str:
        """What tables call it: tdn10, resnet18, targeted resnet18, dn10 thin 6.0M."""
        own = build.title(self.name, self.options)
        if self.narrowed is None:
            return own
        millions = self.narrowed.wanted / 1e6
        return f"{own} {self.narrowed.by} {f'{millions:.1f}' if millions >= 1 else f'{millions:.3g}'}M"

    def build(self, *, clip: bool = True, engine: Engine = "auto", factory: Factory | str | None = None) -> nn.Module:
        """The network with fresh weights.

        A network of a user's own code (`needs_factory`) needs `factory`, the function or its name: nothing is imported
        because a file says so. ValueError if it is not given, and as for `build_model`.
        """
        options = dict(self.options)
        code = options.pop("factory", None)
        if self.needs_factory and factory is None:
            raise ValueError(
                f"the network is made by {code}, code that is not in the file: factory={code!r} imports and runs it"
            )
        model = build.build_model(
            self.name,
            self.input_size,
            self.num_outputs,
            clip=clip,
            engine=engine,
            factory=factory if self.needs_factory else None,
            **self.attention,
            **options,
        )
        if self.narrowed is not None:
            resize_(model, self.narrowed.widths)
        return model

    @property
    def needs_factory(self) -> bool:
        """Whether a user's own code makes it."""
        return self.name == "python"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, of which `from_dict` makes it again."""
        narrowed = self.narrowed
        return {
            "name": self.name,
            "input_size": list(self.input_size),
            "num_outputs": self.num_outputs,
            "options": dict(self.options),
            "attention": dict(self.attention),
            "narrowed": None
            if narrowed is None
            else {**vars(narrowed), "widths": {name: list(width) for name, width in narrowed.widths.items()}},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Architecture:
        """What `to_dict` made plain data of. ValueError if it is something else."""
        try:
            narrowed = content["narrowed"]
            if narrowed is not None:
                widths = {str(name): tuple(map(int, width)) for name, width in narrowed["widths"].items()}
                narrowed = Narrowed(**{**narrowed, "widths": widths})
            channels, height, width = map(int, content["input_size"])
            return cls(
                str(content["name"]),
                (channels, height, width),
                int(content["num_outputs"]),
                dict(content["options"]),
                dict(content["attention"]),
                narrowed,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"it does not say what network it is of: {error!r}") from error
