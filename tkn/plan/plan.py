"""A trained network as a plan: one pass of the ROI engine from input to output."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor, fx, nn

from tkn.app.files import whole_file
from tkn.plan.capture import build_graph, frozen
from tkn.plan.compare import TOLERANCE, Error, compare
from tkn.plan.file import json_value, plan_bytes, read_plan
from tkn.plan.form import called_with, filled, inputs_of, only_slots, slotted, taken
from tkn.plan.graph import Graph
from tkn.plan.parts import PartCosts, Program
from tkn.plan.place import CPU, Place
from tkn.tracing import torch_must_follow


def accelerate(
    model: nn.Module,
    batch_size: int,
    input_size: Any = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    classes: Any = None,
    preprocessing: Any = None,
) -> Plan:
    """A trained network as a plan: plan(x) is model.eval()(x), inside the ROIs only or by torch, whichever is faster.

    Batch normalisation is folded into the convolutions; windows, biases, ReLU and pooling are done as a convolution
    writes; inputs that are known to be constant outside of their own ROIs are not multiplied. The model is copied.

    Args:
        model: of float32; takes tensors [B, C, H, W], [B, C, L] or [B, features], one or several, and returns tensors,
            alone or in lists, tuples and dictionaries.
        batch_size: what the plan is made for; it takes other batches, at another speed.
        input_size: (C, H, W) of the images, (C, L) in one dimension. Of several inputs the sizes, in a tuple in the
            order of the model's arguments or in a dictionary by their names; for an argument that is a list, tuple or
            dictionary of tensors, one of sizes. None: what the first call has, when the plan is then made.
        device, dtype: where the plan computes and in what numbers, wherever the model is: float32 or bfloat16 on "cpu";
            float32, float16 or bfloat16 on "cuda". The images are to be there too, in that type or in float32. In
            bfloat16 on a CPU, one that multiplies pairs of such numbers, the factors of products are rounded to it
            where that is faster; all else, the results too, is of float32. `plan.error` says how far they are off.
        classes, preprocessing: what a user of the plan's file should know, such as the names of the outputs and how
            images are scaled: any JSON values, kept as `plan.classes` and `plan.preprocessing`.

    Layers that the engine does not know are run by torch: `plan.fallbacks` names them. ValueError for a model whose
    operations can't be followed, or that is not of float32, or for bfloat16 on a CPU without the instructions. Where
    the kernels can't be compiled, torch runs everything, after a warning.
    """
    _check_batch_size(batch_size)
    if input_size is not None:
        called_with(input_size)  # or an error, before anything is done
    place = Place.of(device, dtype)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            raise ValueError(f"accelerate takes models of float32; {name} is {tensor.dtype} on {tensor.device}")
    notes = {"classes": json_value("classes", classes), "preprocessing": json_value("preprocessing", preprocessing)}
    if input_size is None:
        return Plan(copy.deepcopy(model), batch_size, place, **notes)
    with _undisturbed():
        return Plan(_checked_graph(model, input_size), batch_size, place, **notes)


def load_plan(
    path: str | Path,
    *,
    batch_size: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Plan:
    """A plan written by `Plan.save`; its first call arranges it anew for this machine, which may take seconds.

    `batch_size`, `device`, `dtype`: as `accelerate`'s, whatever the saved plan had; a batch size of None is the saved
    plan's. One file serves every batch size, device and type. The file is data: nothing in it is executed, and
    everything is checked before it is used. Loading takes no more of the CPU's memory than twice the file's size and
    64 MiB: large images are computed for a check at the first call. FileNotFoundError; ValueError for a file that is no
    plan, is damaged, of another version, or does not compute what it says.
    """
    if batch_size is not None:
        _check_batch_size(batch_size)
    path, place = Path(path), Place.of(device, dtype)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a plan")
    with path.open("rb") as file:
        return _read(file, path.stat().st_size, str(path), place, batch_size=batch_size)


def _check_batch_size(batch_size: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be a whole number, at least 1")


def _read(
    file: BinaryIO,
    size: int,
    name: str,
    place: Place,
    *,
    batch_size: int | None = None,
    small: bool | None = None,
) -> Plan:
    with _undisturbed():
        contents = read_plan(file, size, name)
        checked = contents.check_now(name)
        plan = Plan(
            contents.graph,
            batch_size or contents.batch_size,
            place,
            small=small,
            classes=contents.classes,
            preprocessing=contents.preprocessing,
            arrange=False,
        )
        if not checked:
            plan._checks = (partial(contents.check, name),)
        return plan


def _unpickled(data: bytes, device: str, dtype: torch.dtype, small: bool | None) -> Plan:
    return _read(BytesIO(data), len(data), "the plan", Place.of(device, dtype), small=small)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Whatever the caller is about: gradients, inference mode, autocast, default devices."""
    with torch.inference_mode(False), torch.no_grad(), CPU.undisturbed_modes():
        yield


def _torch_must_see(x: Tensor) -> bool:
    """Whether torch records, transforms or counts operations: then it must be given its own."""
    return torch_must_follow(x) or torch._C._len_torch_dispatch_stack() > 0


def _checked_graph(model: nn.Module, input_size: Any) -> Graph:
    """The model's graph, held against the model: in-place operations, for one, could mean something else."""
    model = frozen(model).cpu()
    graph = build_graph(model, input_size)

    def outputs_of_model(*inputs: Tensor) -> list[Tensor]:
        args, kwargs = filled(graph.form.arguments, inputs)
        return taken(graph.form.result, model(*args, **kwargs), "the result")

    error, told = compare(Program.by_torch(graph).outputs, outputs_of_model, graph.input_shapes)
    name = type(model).__name__
    if error > TOLERANCE:
        raise ValueError(f"{name} can't be followed: its plan would differ by {error:.1e}")
    if not told:
        warnings.warn(
            f"the plan of {name} could not be compared with it: whatever the images, {name} gives the same numbers, or "
            "some that are not finite",
            stacklevel=4,
        )
    return graph


def _types(values: Iterable[object]) -> str:
    return ", ".join(f"a {type(value).__name__}" for value in values) or "nothing"


def _sizes_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`accelerate`'s input_size for such a call."""
    if args and kwargs:
        raise ValueError("a plan made at its first call takes arguments by their places, or all by name")
    found: list[Tensor] = []
    form = slotted(kwargs or args, lambda value: isinstance(value, Tensor), found)
    sizes = filled(form, [tuple(x.shape[1:]) for x in found])
    return sizes[0] if len(args) == 1 and isinstance(args[0], Tensor) else sizes


_call = nn.Module.__call__


class Plan(nn.Module):
    """What `accelerate` makes; call it like the network, or put it among other modules.

    It has no parameters and stays in evaluation mode. Several threads may call it at the same time. Deep copies and
    pickles go through a file's content, and are refused where a file would be. `small`: with vectors over one image
    (True) or over several (False), on the CPU; by default whichever is faster.
    """

    def __init__(
        self,
        source: Graph | nn.Module,
        batch_size: int,
        place: Place = CPU,
        *,
        small: bool | None = None,
        classes: Any = None,
        preprocessing: Any = None,
        arrange: bool = True,
    ) -> None:
        super().__init__()
        self.training = False
        self.batch_size = batch_size
        self.classes = classes
        self.preprocessing = preprocessing
        self._place = place
        self._small = small
        self._lock = threading.Lock()
        self._graph: Graph | None = None
        self._by_torch: Program | None = None
        self._program: Program | None = None
        #: what remains to be done at the first call: a model to follow (in a tuple, for it is no submodule), checks
        self._model: tuple[nn.Module, ...] = ()
        self._checks: tuple[Callable[[], None], ...] = ()
        if not isinstance(source, Graph):
            self._model = (source,)
            return
        self._graph, self._by_torch = source, place.by_torch(source)
        if arrange:
            with _undisturbed():
                self._program = place.arranged(source, batch_size, small)

    def _made(self) -> Graph:
        if self._graph is None:
            raise ValueError("the plan is made at its first use: give accelerate an input_size to have it before")
        return self._graph

    @property
    def input_size(self) -> Any:
        """(C, H, W) of the images, or (C, L); of several inputs the sizes in the form of `accelerate`'s input_size."""
        graph = self._made()
        args, kwargs = filled(graph.form.arguments, graph.input_shapes)
        if kwargs:
            return kwargs
        return args[0] if graph.form.takes_one_tensor else args

    @property
    def device(self) -> torch.device:
        """Where it takes images and gives results."""
        return self._place.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers that are multiplied; on a GPU of the results too, which on a CPU are of float32."""
        return self._place.dtype

    @property
    def error(self) -> Error | None:
        """How far the results were from those of torch in float32 as the plan was made, on a CPU: (largest, mean) as
        parts of the largest output, over three random images within [0, 1). None on a GPU, and before a plan is
        arranged."""
        return None if self._program is None else self._program.error

    @property
    def timings(self) -> dict[str, float]:
        """Seconds that a batch, of 256 images at most, took in each way that was tried as the plan was made, first the
        one that is used; empty where there was one way, on a GPU, and before the first use of a loaded plan."""
        return {} if self._program is None else dict(self._program.timings)

    @property
    def left_to_torch(self) -> tuple[PartCosts, ...]:
        """What torch runs because it was faster when the plan was made, with the seconds of both: operations in a row.
        What the engine does not know is in `fallbacks` instead."""
        return () if self._program is None else tuple(self._program.left)

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """The layers that torch runs because the engine does not know them: "name (type)"."""
        return self._place.fallbacks(self._made())

    def save(self, path: str | Path) -> None:
        """Write the plan's operations and weights to a file for `load_plan`, whole or not at all.

        ValueError that names the parts, if torch runs some for which the format has no place.
        """
        content = self._bytes()
        with whole_file(Path(path)) as temporary:
            temporary.write_bytes(content)

    def _bytes(self) -> bytes:
        graph = self._made()
        with _undisturbed():
            for check in self._checks:
                check()
            return plan_bytes(graph, self.batch_size, self.classes, self.preprocessing)

    def __reduce__(self) -> tuple[Callable[..., Plan], tuple[Any, ...]]:
        return _unpickled, (self._bytes(), str(self.device), self.dtype, self._small)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's; see `forward`."""
        # A tracer of torch.fx, perhaps at work in another thread, has changed nn.Module's own for all modules.
        traced = any(isinstance(argument, fx.Proxy) for argument in (*args, *kwargs.values()))
        return super().__call__(*args, **kwargs) if traced else _call(self, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Tensors [B, C, H, W], [B, C, L] or [B, features] -> what the network returns.

        ValueError for other arguments, sizes, types or devices than the plan's.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.forward(*args, **kwargs)
        given = self._inputs(args, kwargs)
        if any(map(_torch_must_see, given)):
            self._made()
            if self._by_torch is None or self._checks:
                raise ValueError("the plan's file is checked at its first use: call it on images before it is traced")
            with torch.autocast(self.device.type, enabled=False):
                return self._by_torch(*map(self._place.numbers, given))
        with self._place.modes():
            return (self._program or self._make(args, kwargs))(*map(self._place.numbers, given))

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors among a call's arguments; ValueError if the plan does not take them."""
        graph = self._graph
        if graph is None:
            found: list[Any] = []
            form = slotted((args, kwargs), lambda value: isinstance(value, Tensor), found)
            if not found or not only_slots(form[0]) or not only_slots(form[1]):
                others = [value for value in (*args, *kwargs.values()) if not isinstance(value, Tensor)]
                raise ValueError(f"the plan takes tensors, not {_types(others)}")
        elif graph.form.takes_one_tensor and len(args) + len(kwargs) == 1 and kwargs.keys() <= {"x"}:
            found = [*args, *kwargs.values()]
        else:
            found = inputs_of(graph.form, args, kwargs)
        for index, x in enumerate(found):
            if not isinstance(x, Tensor):
                wanted = "a tensor" if len(found) == 1 else "tensors"
                raise ValueError(f"the plan takes {wanted}, not {_types([x])}")
            if not self._place.takes(x):
                raise ValueError(f"the plan takes {self._place}, not {x.dtype} on {x.device} ({x.layout})")
            shape = None if graph is None else graph.input_shapes[index]
            fits = x.dim() in (2, 3, 4) if shape is None else tuple(x.shape[1:]) == shape
            if not fits or x.shape[0] == 0:
                expected = "C, H, W] or [B, C, L" if shape is None else ", ".join(map(str, shape))
                what = "images" if len(found) == 1 else f"as input {index + 1}"
                raise ValueError(f"the plan takes {what} [B, {expected}], not {list(x.shape)}")
        if any(x.shape[0] != found[0].shape[0] for x in found[1:]):  # `len` would fix the number for torch.export
            raise ValueError(f"the plan takes as many images in each input, not {[len(x) for x in found]}")
        return found

    def _make(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        """What is left to the first call, once."""
        with self._lock, _undisturbed():
            if self._program is None:
                graph = self._graph
                if graph is None:
                    graph = _checked_graph(self._model[0], _sizes_of(args, kwargs))
                for check in self._checks:
                    check()
                program = self._place.arranged(graph, self.batch_size, self._small)
                self._graph, self._by_torch = graph, self._place.by_torch(graph)
                self._program, self._model, self._checks = program, (), ()
            return self._program

    def extra_repr(self) -> str:
        size = "that of the first batch" if self._graph is None else self.input_size
        error = f", error {self.error}" if self.error is not None and self.dtype != torch.float32 else ""
        return f"batch_size={self.batch_size}, input_size={size}, {self._place}{error}"

    def train(self, mode: bool = True) -> Plan:
        """Plans are in evaluation mode."""
        if mode:
            raise RuntimeError("a plan can't be trained: train the network, then make its plan with tkn.accelerate")
        return self

    def state_dict(self, *_: Any, **__: Any) -> NoReturn:
        """Not of a plan: RuntimeError."""
        raise RuntimeError("a plan has no parameters: plan.save(path) keeps all of it, tkn.load_plan(path) reads it")

    def load_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        """Not of a plan: RuntimeError."""
        raise RuntimeError(
            "a plan takes no parameters: load them into the network and make its plan with tkn.accelerate, or read a "
            "plan's own file with tkn.load_plan"
        )

    def _load_from_state_dict(self, *_: Any, **__: Any) -> None:  # of a module that holds the plan
        self.load_state_dict()

    def _apply(self, *_: Any, **__: Any) -> NoReturn:  # to, half, cuda, ...
        raise RuntimeError(
            f"a plan stays {self._place}: make another with tkn.accelerate, or read its file with tkn.load_plan; both "
            "take a device and a dtype"
        )
