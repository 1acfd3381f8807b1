"""A network's outputs with one layer's output changed, without computing again what comes before that layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tkn.report.kernels.hooks import Change, hooked_outputs

#: Images on which a network that goes on from a layer is held against the whole network.
_TRIED_ON = 4
#: Arguments of a module that cannot hold a tensor.
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


class _CannotReplayError(Exception):
    """The network does not run as it did when it was recorded."""


@dataclass
class _Call:
    """A module's call. output: what it gave, None if it runs again; copied: whether a copy is given, as the network
    writes over it."""

    module: nn.Module
    output: Tensor | None
    copied: bool = True


class Rerun:
    """Outputs of a model in evaluation for batches [B, C, H, W], with the output of one of its layers changed.

    What ran before the layer is not computed again for every change: the outermost modules that were finished when the
    layer was called give what they gave without the change. Modules run again that write to what they get, that give
    the memory that they get or their own parameters (views, an `nn.Identity`), or that give anything but one tensor,
    and so does whatever is computed outside of modules; of what is written over, copies are given. So the outputs are
    those of the whole network, module by module, to the bit. This is tried on a few images; where it fails, as where
    the layer is called several times, the whole network runs for every change.
    """

    def __init__(self, model: nn.Module, layer: nn.Module, images: Tensor) -> None:
        self._model = model
        self._layer = layer
        self.replays = self._is_exact(images[:_TRIED_ON])

    @torch.no_grad()
    def __call__(self, batch: Tensor, changes: Sequence[Change]) -> list[Tensor]:
        """The model's output for each of the changes of the layer's output, which give new tensors."""
        if self.replays:
            try:
                calls = self._record(batch)
                return [self._replay(calls, batch, change) for change in changes]
            except _CannotReplayError:
                self.replays = False
        outputs = []
        for change in changes:
            with hooked_outputs(self._layer, change):
                outputs.append(self._model(batch))
        return outputs

    @torch.no_grad()
    def _is_exact(self, images: Tensor) -> bool:
        """Twice: from the second time on not everything is a copy."""
        try:
            calls = self._record(images)
            replayed = [self._replay(calls, images, torch.clone) for _ in range(2)]
            whole = self._replay([_Call(call.module, None) for call in calls], images, torch.clone)
        except _CannotReplayError:
            return False
        return all(isinstance(output, Tensor) and torch.equal(output, whole) for output in replayed)

    def _record(self, batch: Tensor) -> list[_Call]:
        """The calls up to the layer's, its own the last, in the order in which they begin; without those within calls
        that are not made again."""
        recorder = _Recorder(self._model, self._layer)
        with ExitStack() as stack:
            for module in self._model.modules():
                for handle in (
                    module.register_forward_pre_hook(recorder.begin, with_kwargs=True),
                    module.register_forward_hook(recorder.end),
                ):
                    stack.callback(handle.remove)
            self._model(batch)
        if recorder.passes != 1 or recorder.calls[-1].output is None:
            raise _CannotReplayError
        return recorder.calls

    def _replay(self, calls: Sequence[_Call], batch: Tensor, change: Change) -> Tensor:
        """The model's output with the recorded calls' outputs; the last call is the layer's."""
        position = 0
        given: list[tuple[_Call, Tensor, int]] = []

        def call_of(module: nn.Module, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
            nonlocal position
            if position == len(calls):
                return forward(*inputs, **named)
            call, position = calls[position], position + 1
            if call.module is not module:
                raise _CannotReplayError
            own = call is calls[-1]
            if call.output is None:
                output = forward(*inputs, **named)
                return change(output) if own else output
            if own:
                return change(call.output)
            output = call.output.clone() if call.copied else call.output
            given.append((call, output, output._version))
            return output

        with _calls_through({call.module for call in calls}, call_of):
            output = self._model(batch)
        if position != len(calls):
            raise _CannotReplayError
        for call, tensor, version in given:
            written = tensor._version != version
            if written and not call.copied:
                raise _CannotReplayError
            call.copied = written
        return output


class _Recorder:
    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        self.calls: list[_Call] = []
        #: of the layer
        self.passes = 0
        self._layer = layer
        self._own = {_memory(tensor) for tensor in (*model.parameters(), *model.buffers())}
        #: the calls that have begun and not ended: which of `calls`, and what they get
        self._open: list[tuple[int, list[Any], list[int]]] = []

    def begin(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self.passes:
            return
        leaves = tree_leaves((inputs, named))
        self._open.append((len(self.calls), leaves, _versions(leaves)))
        self.calls.append(_Call(module, None))

    def end(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        if self.passes:
            self.passes += module is self._layer
            return
        at, leaves, versions = self._open.pop()
        fresh = type(output) is Tensor and versions == _versions(leaves) and self._is_apart(output, leaves)
        if module is self._layer:
            self.passes = 1
            del self.calls[at + 1 :]
        if fresh:
            self.calls[at:] = [_Call(module, output.clone())]

    def _is_apart(self, output: Tensor, leaves: Sequence[Any]) -> bool:
        """Whether the output's memory is neither that of what the call got nor the network's own."""
        known = all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves)
        taken = self._own | {_memory(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
        return known and output.layout == torch.strided and _memory(output) not in taken


def _versions(leaves: Sequence[Any]) -> list[int]:
    """How often each tensor was written to."""
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def _calls_through(modules: set[nn.Module], call_of: Callable[..., Any]) -> Iterator[None]:
    """Within the context a call of these modules is `call_of(module, its own forward, ...)`."""
    with ExitStack() as stack:
        for module in modules:
            # Sequences of this project compute hooked layers one by one, and not without calling them.
            stack.callback(module.register_forward_pre_hook(_ignore).remove)
            stack.enter_context(_forward(module, call_of))
        yield


@contextmanager
def _forward(module: nn.Module, call_of: Callable[..., Any]) -> Iterator[None]:
    attributes, before = vars(module), vars(module).get("forward")
    own = module.forward

    def forward(*inputs: Any, **named: Any) -> Any:
        return call_of(module, own, *inputs, **named)

    attributes["forward"] = forward
    try:
        yield
    finally:
        del attributes["forward"]
        if before is not None:
            attributes["forward"] = before


def _ignore(_module: nn.Module, _inputs: Any) -> None:
    """A hook that does nothing."""
