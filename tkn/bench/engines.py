"""The engines that are timed, by name: each makes a network and a batch into a call without arguments.

Peers are imported when they are asked for: without the extra "bench" they are reported as not installed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tkn.backends.torch.fourier import suited, use_fourier
from tkn.layers import TargetConv1d, TargetConv2d, roi_layers
from tkn.macs import count_macs
from tkn.ops.engines import backend_of
from tkn.penalty import scale_penalty
from tkn.plan.place import CPU, Place
from tkn.plan.plan import accelerate

#: Allowed differences from torch eager, as a part of the largest output. Engines sum in other orders, or in bfloat16.
TOLERANCE = {"float32": 1e-3, "reduced": 0.1}
#: The same of gradients, as a part of their norm: through many ReLUs and batch normalisations rounding grows.
GRADIENT_TOLERANCE = {"float32": 0.02, "reduced": 0.3}

_REDUCED = "reduced"
_FLOAT32 = "float32"


def _precision(dtype: torch.dtype) -> str:
    """What products of numbers of `dtype` count as."""
    return _FLOAT32 if dtype == torch.float32 else _REDUCED


@dataclass(frozen=True)
class Prepared:
    """A call that computes a batch, or takes a training step, and what there is to say of it.

    difference: of the outputs (training: of the gradients) from torch eager's, relative.
    precision: "float32" or "reduced".
    notes: such as layers that an engine leaves to torch.
    """

    call: Callable[[], object]
    difference: float
    precision: str = _FLOAT32
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inference:
    """A call that computes a batch: () -> [B, outputs], a tensor or an array."""

    call: Callable[[], Any]
    precision: str = _FLOAT32
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingOptions:
    """How torch takes a training step: compiled or not, memory format, and what computes its convolutions."""

    compiled: bool = False
    mode: str | None = None
    channels_last: bool = False
    fourier: bool = False
    target_engine: Literal["dense", "roi"] = "dense"


@dataclass(frozen=True)
class TimedEngine:
    """What runs dense networks (a peer) or targeted ones, in inference, training or both.

    infer: (network in evaluation mode, images [B, C, H, W], threads) -> Inference, where the images are and in numbers
    of their type; the network is of float32, on the CPU.
    """

    targeted: bool = False
    infer: Callable[[nn.Module, Tensor, int], Inference] | None = None
    train: TrainingOptions | None = None
    #: the ROI engine: what speed-ups are told of
    ours: bool = False
    #: the types of devices on which it computes
    devices: tuple[str, ...] = ("cpu", "cuda")
    #: false for a network that it would compute as another engine does
    applies_to: Callable[[nn.Module], bool] = lambda _network: True


def prepare_inference(
    engine: TimedEngine, network: nn.Module, images: Tensor, threads: int, place: Place = CPU
) -> Prepared:
    """Ready `engine` at `place`, its outputs held against torch eager's of float32 on the same images [B, C, H, W].

    The call is for within torch.inference_mode(). ValueError if the outputs differ by more than TOLERANCE; whatever a
    missing or failing engine raises.
    """
    assert engine.infer is not None
    images = images.to(place.device)
    reference = _copied(network, False, "dense", place.device)
    inference = engine.infer(network, place.numbers(images), threads)
    with torch.inference_mode():
        expected, outputs = _as_array(reference(images)), _as_array(inference.call())
    precision = _REDUCED if _REDUCED in (inference.precision, _precision(place.dtype)) else _FLOAT32
    if outputs.shape != expected.shape:
        raise ValueError(f"its outputs have shape {outputs.shape}, not {expected.shape}")
    difference = float(np.abs(outputs - expected).max() / np.abs(expected).max())
    _require_near(difference, TOLERANCE[precision], "outputs")
    return Prepared(inference.call, difference, precision, inference.notes)


def _as_array(outputs: Any) -> NDArray[np.float32]:
    return outputs.float().cpu().numpy() if isinstance(outputs, Tensor) else np.asarray(outputs)


def prepare_training(
    engine: TimedEngine, network: nn.Module, images: Tensor, labels: Tensor, place: Place = CPU
) -> Prepared:
    """Ready training steps of `engine` at `place`, its gradients held against torch eager's of float32.

    A step is zero_grad, forward, cross entropy, backward, SGD (momentum 0.9, Nesterov); with target layers the scale
    penalty and the projection too. In halves the forward pass is under autocast. ValueError and others as
    `prepare_inference`.
    """
    assert engine.train is not None
    if engine.train.target_engine == "roi":
        _require_roi_engine(place.device, place.dtype)
    sizes = {row.name: row.map_size for row in count_macs(network, tuple(images.shape[1:])).target_layers}
    images, labels = images.to(place.device), labels.to(place.device)
    expected = _gradients(
        *_training_network(network, TrainingOptions(), Place(place.device, torch.float32)), images, labels
    )
    model, forward = _training_network(network, engine.train, place)
    if engine.train.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    gradients = _gradients(model, forward, images, labels)
    difference = float((gradients - expected).norm() / expected.norm())
    precision = _precision(place.dtype)
    _require_near(difference, GRADIENT_TOLERANCE[precision], "gradients")

    # So small a rate that thousands of steps on one batch leave the network, and its cost, as it is.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-7, momentum=0.9, nesterov=True)
    targets = roi_layers(model)

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(images), labels)
        if targets:
            loss = loss + scale_penalty(model, l2=1e-4)
        loss.backward()
        optimizer.step()
        for name, layer in targets.items():
            layer.project_(sizes[name])

    return Prepared(step, difference, precision)


def _require_near(difference: float, tolerance: float, what: str) -> None:
    if not difference <= tolerance:  # NaN too
        raise ValueError(f"its {what} differ from torch's by {difference:.2g} of their size, more than {tolerance:g}")


def _copied(
    network: nn.Module,
    channels_last: bool,
    target_engine: Literal["dense", "roi"],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    fourier: bool = False,
) -> nn.Module:
    """A copy in a memory format whose target layers are computed by `target_engine`.

    `fourier`: its convolutions of many channels in the frequency domain.
    """
    network = copy.deepcopy(network).to(device, dtype)
    if fourier:
        use_fourier(network)
    for module in network.modules():
        if isinstance(module, TargetConv1d | TargetConv2d):
            module.engine = target_engine
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    return network


def _eager(channels_last: bool, fourier: bool = False) -> Callable[[nn.Module, Tensor, int], Inference]:
    def infer(network: nn.Module, images: Tensor, _threads: int) -> Inference:
        forward = _copied(network, channels_last, "dense", images.device, images.dtype, fourier=fourier)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return Inference(lambda: forward(images))

    return infer


def _compiled(
    options: dict[str, Any] | None = None, mode: str | None = None
) -> Callable[[nn.Module, Tensor, int], Inference]:
    def infer(network: nn.Module, images: Tensor, _threads: int) -> Inference:
        channels_last = images.device.type == "cuda"  # as the GPU's matrix units read them
        # A copy: another engine's compilation must not be found in its place.
        copied = _copied(network, channels_last, "dense", images.device, images.dtype)
        forward = torch.compile(copied, dynamic=False, options=options, mode=mode)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return Inference(lambda: forward(images))

    return infer


@lru_cache(maxsize=1)  # for the engines that follow each other on one network and batch
def _onnx(network: nn.Module, *shape: int) -> bytes:
    """The network as ONNX for batches of exactly this shape."""
    import onnxscript  # noqa: F401  # what torch's exporter writes with

    images = torch.zeros(shape)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's and onnxscript's own
        program = torch.onnx.export(
            network, (images,), dynamo=True, verbose=False, input_names=["images"], output_names=["outputs"]
        )
    assert program is not None
    return program.model_proto.SerializeToString()


def _onnxruntime(network: nn.Module, images: Tensor, threads: int) -> Inference:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(_onnx(network, *images.shape), options, providers=["CPUExecutionProvider"])
    # Input and output stay where they are: nothing is copied in a call.
    inputs = images.numpy()
    outputs = np.empty(session.get_outputs()[0].shape, np.float32)
    binding = session.io_binding()
    binding.bind_ortvalue_input("images", onnxruntime.OrtValue.ortvalue_from_numpy(inputs))
    binding.bind_ortvalue_output("outputs", onnxruntime.OrtValue.ortvalue_from_numpy(outputs))

    def run() -> Any:
        session.run_with_iobinding(binding)
        return outputs

    return Inference(run)


#: The types in which OpenVINO computes, by its names.
_OPENVINO_TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def _openvino(reduced: bool) -> Callable[[nn.Module, Tensor, int], Inference]:
    def infer(network: nn.Module, images: Tensor, threads: int) -> Inference:
        import openvino

        core = openvino.Core()
        properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        if not reduced:
            properties["INFERENCE_PRECISION_HINT"] = "f32"
        compiled = core.compile_model(core.read_model(_onnx(network, *images.shape)), "CPU", properties)
        request = compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(images.numpy(), shared_memory=True))
        outputs = request.get_output_tensor()

        def run() -> Any:
            request.infer()
            return outputs.data

        chosen = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        precision = _precision(_OPENVINO_TYPES[chosen])
        return Inference(run, precision, (chosen,) if reduced else ())

    return infer


def _tkn(dtype: torch.dtype | None = None) -> Callable[[nn.Module, Tensor, int], Inference]:
    """A plan in `dtype`; by default in that of the images."""

    def infer(network: nn.Module, images: Tensor, _threads: int) -> Inference:
        _require_roi_engine(images.device, images.dtype)
        size, numbers = tuple(images.shape[1:]), dtype or images.dtype
        plan = accelerate(network, len(images), size, device=images.device, dtype=numbers)
        notes = [f"by torch: {', '.join(plan.fallbacks)}"] if plan.fallbacks else []
        way = next(iter(plan.timings), "")
        if way.startswith("torch"):
            notes.append(f"the plan computes all by {way}, which was faster as it was made")
        if dtype is not None:
            notes.append(str(dtype).removeprefix("torch."))
        return Inference(lambda: plan(images), _precision(numbers), tuple(notes))

    return infer


def _require_roi_engine(device: torch.device, dtype: torch.dtype) -> None:
    """RuntimeError where the kernels can't be had: torch would compute, and be timed, in their place."""
    backend = backend_of(device)
    if backend is None or not backend.available(device, dtype, may_build=True):
        raise RuntimeError("the ROI engine's kernels are not available on this machine")


def _training_network(
    network: nn.Module, options: TrainingOptions, place: Place
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A copy of the network in training mode, and its forward, compiled or not; logits of float32."""
    model = _copied(
        network, options.channels_last, options.target_engine, place.device, fourier=options.fourier
    ).train()
    called = torch.compile(model, dynamic=False, mode=options.mode) if options.compiled else model
    if place.dtype == torch.float32:
        return model, called

    def forward(x: Tensor) -> Tensor:
        # Its cache holds what a graph that is captured may not read.
        with torch.autocast(place.device.type, place.dtype, cache_enabled=False):
            return called(x).float()

    return model, forward


def _gradients(model: nn.Module, forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """All gradients of the cross entropy in one row, without dropout; the model is left in training mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    F.cross_entropy(forward(images), labels).backward()
    model.train()
    gradients = [parameter.grad for parameter in model.parameters()]
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def _has_two_dimensions(network: nn.Module) -> bool:
    """Whether there are maps of two dimensions, which may be laid out in another memory format."""
    return any(isinstance(module, nn.Conv2d) for module in network.modules())


#: Graphs are captured around the call, here and for every other engine.
_MAX_AUTOTUNE = "max-autotune-no-cudagraphs"

TIMED_ENGINES: dict[str, TimedEngine] = {
    "torch": TimedEngine(infer=_eager(False), train=TrainingOptions()),
    "torch-channels-last": TimedEngine(
        infer=_eager(True), train=TrainingOptions(channels_last=True), applies_to=_has_two_dimensions
    ),
    "torch-compile": TimedEngine(infer=_compiled(), train=TrainingOptions(compiled=True)),
    "torch-compile-frozen": TimedEngine(infer=_compiled({"freezing": True})),
    "torch-compile-max-autotune": TimedEngine(
        infer=_compiled(mode=_MAX_AUTOTUNE),
        train=TrainingOptions(compiled=True, mode=_MAX_AUTOTUNE, channels_last=True),
        devices=("cuda",),
    ),
    "fourier": TimedEngine(
        devices=("cpu",),
        infer=_eager(True, fourier=True),
        train=TrainingOptions(channels_last=True, fourier=True),
        applies_to=lambda network: bool(suited(network)),
    ),
    "onnxruntime": TimedEngine(infer=_onnxruntime, devices=("cpu",)),
    "openvino": TimedEngine(infer=_openvino(reduced=False), devices=("cpu",)),
    "openvino-reduced": TimedEngine(infer=_openvino(reduced=True), devices=("cpu",)),
    "torch-masked": TimedEngine(targeted=True, infer=_eager(False), train=TrainingOptions()),
    "torch-masked-channels-last": TimedEngine(
        targeted=True,
        infer=_eager(True),
        train=TrainingOptions(channels_last=True),
        applies_to=_has_two_dimensions,
    ),
    "tkn-dense": TimedEngine(infer=_tkn()),
    "tkn": TimedEngine(targeted=True, infer=_tkn(), train=TrainingOptions(target_engine="roi"), ours=True),
    "tkn-channels-last": TimedEngine(
        targeted=True,
        train=TrainingOptions(channels_last=True, target_engine="roi"),
        ours=True,
        applies_to=_has_two_dimensions,
    ),
    "tkn-reduced": TimedEngine(targeted=True, infer=_tkn(torch.bfloat16), ours=True, devices=("cpu",)),
}
