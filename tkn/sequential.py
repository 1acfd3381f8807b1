"""A sequence of layers in which target layers hand their ROIs on to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

from tkn.geometry import Pool, simple_pool
from tkn.layers import TargetConv1d, TargetConv2d, TargetConv3d
from tkn.ops.live import linear_of_live, live_inputs
from tkn.ops.operator import run_sequence
from tkn.spec import Target

_TargetConv = TargetConv1d | TargetConv2d | TargetConv3d
#: The layers whose forward the engine computes, and the poolings of their maps.
_TARGETS: tuple[type[_TargetConv], ...] = (TargetConv1d, TargetConv2d, TargetConv3d)
_POOLINGS: dict[int, tuple[type[nn.Module], ...]] = {
    1: (nn.MaxPool1d, nn.AvgPool1d),
    2: (nn.MaxPool2d, nn.AvgPool2d),
    3: (nn.MaxPool3d, nn.AvgPool3d),
}


class TargetSequential(nn.Sequential):
    """`nn.Sequential`, with the same results, that lets the ROI engine compute a target layer and what follows it.

    A ReLU and a pooling after a target layer are computed with it, and a target layer after these multiplies only with
    the inputs that the ROIs of the layer before can reach; so does a fully connected layer after `nn.Flatten`, where
    these are few. Hooks on a layer keep it from being joined.
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):  # a tracer wants to see every layer
            return super().forward(input)
        layers = list(self)
        x, position = input, 0
        while position < len(layers):
            run, position = _run(layers, position)
            if len(run) == 1 and run[0].joined == 1:
                x = run[0].layer(x)
            elif isinstance(run[0].layer, _TARGETS):
                targets, engine = [step.target() for step in run], run[0].layer.operator_engine()
                padded = run[0].layer.padded(x)
                x = run_sequence(padded, targets, engine)
                _note_passes(run, targets, tuple(padded.shape[-targets[0].spec.dims :]))
                linear = _linear(layers, position)
                live = None if linear is None or engine.startswith("dense") else live_inputs(padded, targets)
                if linear is not None and live is not None and x[0].numel() == linear.weight.shape[1]:
                    x, position = linear_of_live(x.flatten(1), live, linear.weight, linear.bias), position + 2
        return x


def _note_passes(run: list[_Step], targets: list[Target], size: tuple[int, ...]) -> None:
    """Let each target layer remember its map; `size`: of the first one's padded input."""
    for step, target in zip(run, targets, strict=True):
        assert isinstance(step.layer, _TARGETS)
        step.layer.note_pass(target.output_size(size))
        size = target.result_size(size)


@dataclass(frozen=True)
class _Step:
    """A layer, and how many layers of the sequence it stands for: a target layer with its ReLU and pooling."""

    layer: nn.Module
    relu: bool = False
    pool: Pool | None = None

    @property
    def joined(self) -> int:
        return 1 + self.relu + (self.pool is not None)

    def target(self) -> Target:
        assert isinstance(self.layer, _TARGETS)
        return self.layer.target(relu=self.relu, pool=self.pool)


def _run(layers: list[nn.Module], position: int) -> tuple[list[_Step], int]:
    """The layers from `position` on that are computed together, and the position after them."""
    run: list[_Step] = []
    while position < len(layers):
        layer = layers[position]
        if not _is_target(layer):
            return (run, position) if run else ([_Step(layer)], position + 1)
        if run and not _continues(layer, run[0].layer):
            break
        relu = _follows(layers, position + 1, nn.ReLU)
        step = _Step(layer, relu, _pool(layers, position + 1 + relu, layer.num_dims))
        run.append(step)
        position += step.joined
    return run, position


def _continues(layer: _TargetConv, first: nn.Module) -> bool:
    """Whether a layer may be computed with those before it: its input needs no other padding, its maps have as many
    axes, its engine is theirs."""
    assert isinstance(first, _TARGETS)
    alike = layer.num_dims == first.num_dims and layer.operator_engine() == first.operator_engine()
    return alike and layer.padding_mode == "zeros"


def _is_target(layer: nn.Module) -> TypeGuard[_TargetConv]:
    """Whether its forward is the one that the engine computes."""
    return isinstance(layer, _TARGETS) and type(layer).forward is TargetConv2d.forward and not hooked(layer)


def hooked(layer: nn.Module) -> bool:
    """Whether somebody wants to see what goes in or comes out."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or bool(torch_module._has_any_global_hook())


def _linear(layers: list[nn.Module], position: int) -> nn.Linear | None:
    """The fully connected layer that reads all of what goes into `position`, flattened there."""
    if not (_follows(layers, position, nn.Flatten) and _follows(layers, position + 1, nn.Linear)):
        return None
    flatten, linear = layers[position], layers[position + 1]
    assert isinstance(flatten, nn.Flatten) and isinstance(linear, nn.Linear)
    plain = type(linear.weight) in (Tensor, nn.Parameter) and linear.weight.device.type == "cpu"
    return linear if plain and (flatten.start_dim, flatten.end_dim) in ((1, -1), (1, 3)) else None


def _follows(layers: list[nn.Module], position: int, kind: type[nn.Module]) -> bool:
    if position >= len(layers) or type(layers[position]) is not kind:
        return False
    return not hooked(layers[position]) and "forward" not in vars(layers[position])


def _pool(layers: list[nn.Module], position: int, dims: int) -> Pool | None:
    """The pooling of maps of `dims` axes at `position` if its windows neither overlap nor leave the map."""
    for kind in _POOLINGS[dims]:
        if _follows(layers, position, kind):
            return simple_pool(layers[position], dims)
    return None
