"""The kernels' C structures and functions as ctypes knows them, and how the structures are filled from arrays."""

from __future__ import annotations

from ctypes import CDLL, POINTER, Structure, c_double, c_int, c_int32, c_int64, c_void_p, sizeof
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX, SUM, PRODUCT = 1, 2, 3


class Kind(IntEnum):
    """`Kind` of kernels.cpp: what an instruction of a plan does."""

    GATHER = 0
    CONV = 1
    PACK = 2
    UNPACK = 3
    MAP_GATHER = 4
    MAP_CONV = 5
    MAP_FIRST = 6
    MAP_PICK = 7
    MAP_PACK = 8
    MAP_UNPACK = 9
    PLANE_GATHER = 10
    PLANE_CONV = 11
    MAP_SELECT = 12
    MAP_NORM = 13
    PLANE_RESAMPLE = 14
    ROW_NORM = 15
    PAIR = 16
    CONV_PAIRS = 17
    MAP_PAIR = 18
    MAP_CONV_PAIRS = 19


class FunctionStruct(Structure):
    """`Function` of nonlinear.h."""

    _fields_ = (("kind", c_int32), ("slope", c_double))


class GatherStruct(Structure):
    """`Gather` of rows.h."""

    _fields_ = (
        ("pixels", c_int32),
        ("out_start", c_void_p),
        ("out_base", c_void_p),
        ("child_start", c_void_p),
        ("child_row", c_void_p),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("init", c_void_p),
        ("factor", c_double),
        ("pooling", c_int32),
        ("function", FunctionStruct),
    )


class ConvStruct(Structure):
    """`Conv` of rows.h."""

    _fields_ = (
        ("pixels", c_int32),
        ("dst_start", c_void_p),
        ("dst_channel", c_void_p),
        ("dst_base", c_void_p),
        ("tap_start", c_void_p),
        ("tap_pixel", c_void_p),
        ("tap_index", c_void_p),
        ("src_start", c_void_p),
        ("src_channel", c_void_p),
        ("src_base", c_void_p),
        ("chunks", c_int32),
        ("groups", c_int32),
        ("dst_per_group", c_int32),
        ("src_per_group", c_int32),
        ("weight_dst", c_int64),
        ("weight_tap", c_int64),
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("function", FunctionStruct),
        ("windows", c_int32),
        ("window_start", c_void_p),
        ("pool", GatherStruct),
        ("pairing", c_void_p),
    )


class DenseStruct(Structure):
    """`Dense` of rows.h."""

    _fields_ = (
        ("channels", c_int32),
        ("height", c_int32),
        ("width", c_int32),
        ("image", c_int64),
        ("channel", c_int64),
        ("row", c_int64),
        ("column", c_int64),
        ("rows", c_void_p),
        ("outside", c_void_p),
    )


class InstructionStruct(Structure):
    """`Instruction` of kernels.cpp."""

    _fields_ = (
        ("kind", c_int32),
        ("dense", c_int32),
        ("spec", c_void_p),
        ("src", c_int64),
        ("dst", c_int64),
        ("parts", c_int32),
        ("work", c_void_p),
    )


class StepStruct(Structure):
    """`Step` of kernels.cpp."""

    _fields_ = (("instruction", c_int32), ("begin", c_int32), ("end", c_int32))


class MapPoolStruct(Structure):
    """`MapPool` of maps.h."""

    _fields_ = (
        ("kind", c_int32),
        ("function", FunctionStruct),
        ("factor", c_double),
    )


class MapConvStruct(Structure):
    """`MapConv` of maps.h."""

    _fields_ = (
        ("sets", c_int32),
        ("set_start", c_void_p),
        ("channel", c_void_p),
        ("pixel_start", c_void_p),
        ("source", c_void_p),
        ("value_start", c_void_p),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("out_start", c_void_p),
        ("out", c_void_p),
        ("out_channel", c_int64),
        ("child_start", c_void_p),
        ("child", c_void_p),
        ("missing", c_void_p),
        ("outside", c_void_p),
        ("run_first", c_void_p),
        ("runs", c_void_p),
        ("run_offset", c_void_p),
        ("run_length", c_void_p),
        ("run_weight", c_void_p),
        ("weight", c_void_p),
        ("weight_dst", c_int64),
        ("pool", MapPoolStruct),
    )


class MapFirstStruct(Structure):
    """`MapFirst` of maps.h."""

    _fields_ = (
        ("pixels", c_int32),
        ("out", c_void_p),
        ("channels", c_int32),
        ("out_channel", c_int64),
        ("child_start", c_void_p),
        ("source", c_void_p),
        ("chunk_start", c_void_p),
        ("chunk", c_void_p),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("width", c_int32),
        ("taps", c_int32),
        ("tap_offset", c_void_p),
        ("weight", c_void_p),
        ("pool", MapPoolStruct),
    )


class MapGatherStruct(Structure):
    """`MapGather` of maps.h."""

    _fields_ = (
        ("pixels", c_int32),
        ("out", c_void_p),
        ("parts", c_int32),
        ("channels", c_void_p),
        ("step", c_void_p),
        ("first", c_void_p),
        ("out_channel", c_int64),
        ("child_start", c_void_p),
        ("child", c_void_p),
        ("children", c_int32),
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("combined", c_int32),
        ("pool", MapPoolStruct),
    )


class MapPickStruct(Structure):
    """`MapPick` of maps.h."""

    _fields_ = (
        ("count", c_int32),
        ("source", c_void_p),
    )


class MapDenseStruct(Structure):
    """`MapDense` of maps.h."""

    _fields_ = (
        ("channels", c_int32),
        ("height", c_int32),
        ("width", c_int32),
        ("channel", c_int64),
        ("line", c_int64),
        ("pixel", c_int64),
    )


class PlaneConvStruct(Structure):
    """`PlaneConv` of planes.h."""

    _fields_ = (
        ("tasks", c_int32),
        ("task", c_void_p),
        ("input", c_void_p),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("kernel_height", c_int32),
        ("kernel_width", c_int32),
        ("stride_height", c_int32),
        ("stride_width", c_int32),
        ("dilation_height", c_int32),
        ("dilation_width", c_int32),
        ("outputs_per_group", c_int32),
        ("inputs_per_group", c_int32),
        ("plane", c_int64),
        ("line", c_int64),
        ("out_channel", c_int64),
        ("out_line", c_int64),
        ("out_pixel", c_int64),
        ("flat", c_int32),
        ("pool_height", c_int32),
        ("pool_width", c_int32),
        ("weight", c_void_p),
        ("pool", MapPoolStruct),
    )


class PlaneTaskStruct(Structure):
    """`PlaneTask` of planes.h."""

    _fields_ = (
        ("output", c_int32),
        ("outputs", c_int32),
        ("row", c_int32),
        ("column", c_int32),
        ("rows", c_int32),
        ("columns", c_int32),
        ("first_input", c_int32),
        ("inputs", c_int32),
        ("uniform", c_int32),
        ("value_start", c_int64),
    )


class PlaneGatherStruct(Structure):
    """`PlaneGather` of planes.h."""

    _fields_ = (
        ("channels", c_int32),
        ("operands", c_int32),
        ("combined", c_int32),
        ("one_pixel", c_int32),
        ("band", c_int32),
        ("source", c_void_p),
        ("line", c_void_p),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("height", c_int32),
        ("width", c_int32),
        ("out_height", c_int32),
        ("out_width", c_int32),
        ("out_plane", c_int64),
        ("out_line", c_int64),
        ("kernel_height", c_int32),
        ("kernel_width", c_int32),
        ("stride_height", c_int32),
        ("stride_width", c_int32),
        ("top", c_int32),
        ("left", c_int32),
        ("dilation_height", c_int32),
        ("dilation_width", c_int32),
        ("pool", MapPoolStruct),
    )


class MapSelectStruct(Structure):
    """`MapSelect` of channels.h."""

    _fields_ = (
        ("width", c_int32),
        ("out", c_void_p),
        ("out_channel", c_int64),
        ("channels", c_int32),
        ("first", c_void_p),
        ("line", c_void_p),
        ("pixel", c_void_p),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("function", FunctionStruct),
    )


class PairingStruct(Structure):
    """`Pairing` of pair_rows.h."""

    _fields_ = (
        ("pixels", c_int32),
        ("out_start", c_void_p),
        ("out_base", c_void_p),
        ("row", c_void_p),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("function", FunctionStruct),
    )


class MapNormStruct(Structure):
    """`MapNorm` of channels.h."""

    _fields_ = (
        ("channels", c_int32),
        ("width", c_int32),
        ("channel", c_int64),
        ("line", c_int64),
        ("pixel", c_int64),
        ("out_channel", c_int64),
        ("out_line", c_int64),
        ("out_pixel", c_int64),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("eps", c_double),
    )


class RowNormStruct(Structure):
    """`RowNorm` of channels.h."""

    _fields_ = (
        ("channels", c_int32),
        ("row", c_void_p),
        ("out_base", c_void_p),
        ("known", c_void_p),
        ("known_mean", c_void_p),
        ("known_square", c_void_p),
        ("outside", c_void_p),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("eps", c_double),
    )


class PlaneResampleStruct(Structure):
    """`PlaneResample` of planes.h."""

    _fields_ = (
        ("channels", c_int32),
        ("band", c_int32),
        ("source", c_void_p),
        ("line", c_void_p),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("function", FunctionStruct),
        ("width", c_int32),
        ("out_height", c_int32),
        ("out_width", c_int32),
        ("out_plane", c_int64),
        ("out_line", c_int64),
        ("first_line", c_void_p),
        ("line_weight", c_void_p),
        ("line_taps", c_int32),
        ("first_column", c_void_p),
        ("column_weight", c_void_p),
        ("column_taps", c_int32),
        ("column_pitch", c_int32),
    )


class MapPairingStruct(Structure):
    """`MapPairing` of maps.h."""

    _fields_ = (
        ("columns", c_int32),
        ("line", c_int64),
        ("pixel", c_int64),
        ("pair_line", c_int64),
        ("pair_pixel", c_int64),
    )


class NormedConvStruct(Structure):
    """`NormedConv` of normed.h."""

    _fields_ = (
        ("batch", c_int32),
        ("channels", c_int32),
        ("outputs", c_int32),
        ("height", c_int32),
        ("width", c_int32),
        ("x", c_void_p),
        ("mean", c_void_p),
        ("rstd", c_void_p),
        ("factor", c_void_p),
        ("shift", c_void_p),
        ("roi", c_void_p),
        ("window", c_void_p),
        ("weight", c_void_p),
        ("turned", c_void_p),
        ("y", c_void_p),
        ("grad_y", c_void_p),
        ("grad_x", c_void_p),
        ("grad_factor", c_void_p),
        ("grad_shift", c_void_p),
        ("grad_weight", c_void_p),
        ("grad_window", c_void_p),
    )


#: All structures, in the order in which `tkn_struct_sizes` of kernels.cpp gives their sizes.
STRUCTURES: tuple[type[Structure], ...] = (
    GatherStruct,
    ConvStruct,
    DenseStruct,
    InstructionStruct,
    StepStruct,
    MapPoolStruct,
    MapConvStruct,
    MapFirstStruct,
    MapGatherStruct,
    MapPickStruct,
    MapDenseStruct,
    FunctionStruct,
    PlaneConvStruct,
    PlaneTaskStruct,
    PlaneGatherStruct,
    MapSelectStruct,
    MapNormStruct,
    RowNormStruct,
    PlaneResampleStruct,
    PairingStruct,
    MapPairingStruct,
    NormedConvStruct,
)

#: Rows: where they begin, and how many numbers a tile takes.
_ROWS = (c_void_p, c_int64)
#: Tiles, lanes, threads.
_TILED = (c_int, c_int, c_int)
_CONV, _GATHER, _DENSE = POINTER(ConvStruct), POINTER(GatherStruct), POINTER(DenseStruct)

#: The arguments of the kernels' functions; those that return something return an int.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "tkn_width": (),
    "tkn_bfloat16": (),
    "tkn_struct_sizes": (POINTER(c_int64), c_int),
    "tkn_conv": (_CONV, *_ROWS, *_ROWS, *_TILED),
    "tkn_conv_bfloat16": (_CONV, *_ROWS, *_ROWS, c_int, c_void_p, *_TILED),
    "tkn_gather": (_GATHER, *_ROWS, *_ROWS, *_TILED),
    "tkn_gather_backward": (_GATHER, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, *_TILED),
    "tkn_pack": (_DENSE, c_void_p, c_int, *_ROWS, c_int, c_int, c_int, c_int),
    "tkn_unpack": (_DENSE, *_ROWS, c_void_p, c_int, c_int, c_int, c_int, c_int),
    "tkn_weight_grad": (
        *(_CONV, *_ROWS, *_ROWS, c_void_p, c_int, c_int),
        *(c_void_p, c_void_p, c_int64, c_int, c_int, c_int, c_int),
    ),
    "tkn_normed_statistics": (POINTER(NormedConvStruct), c_void_p, c_void_p, c_int),
    "tkn_normed_forward": (POINTER(NormedConvStruct), c_int),
    "tkn_normed_backward": (POINTER(NormedConvStruct), c_int),
    "tkn_run": (
        *(POINTER(InstructionStruct), c_int, POINTER(StepStruct), c_int, POINTER(c_void_p)),
        *(c_void_p, c_int64, c_int, c_int, c_int, c_int),
    ),
    "tkn_run_maps": (POINTER(InstructionStruct), c_int, POINTER(c_void_p), c_void_p, c_int64, c_int, c_int),
}
_RETURNING = ("tkn_width", "tkn_bfloat16", "tkn_struct_sizes")


def check_abi(library: CDLL) -> None:
    """Declare the arguments of the library's functions; RuntimeError if its structures are not the ones here.

    To be called once for each library that is loaded, before anything else of it.
    """
    for name, arguments in ARGUMENTS.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise RuntimeError(f"the kernels have no function {name}") from error
        function.argtypes = arguments
        function.restype = c_int if name in _RETURNING else None
    sizes = (c_int64 * len(STRUCTURES))()
    count = library.tkn_struct_sizes(sizes, len(sizes))
    if count != len(STRUCTURES):
        raise RuntimeError(f"the kernels have {count} structures, not {len(STRUCTURES)}")
    for structure, size in zip(STRUCTURES, sizes, strict=True):
        if sizeof(structure) != size:
            raise RuntimeError(f"the kernels' {structure.__name__} takes {size} bytes, not {sizeof(structure)}")


def address(values: NDArray[Any] | Tensor) -> c_void_p:
    """Where the numbers of an array or tensor begin; ValueError unless they lie in memory as they are indexed."""
    if isinstance(values, np.ndarray):
        if not values.flags.c_contiguous:
            raise ValueError(f"the kernels take contiguous arrays, not strides of {values.strides}")
        return c_void_p(values.ctypes.data)
    _check_tensor(values)
    if not values.is_contiguous():
        raise ValueError(f"the kernels take contiguous tensors, not strides of {values.stride()}")
    return c_void_p(values.data_ptr())


def strided_address(x: Tensor) -> c_void_p:
    """As `address`, of a tensor with any strides."""
    _check_tensor(x)
    return c_void_p(x.data_ptr())


def _check_tensor(x: Tensor) -> None:
    if type(x) not in (Tensor, torch.nn.Parameter) or x.device.type != "cpu" or x.layout != torch.strided:
        raise ValueError(f"the kernels take plain tensors on the CPU, not {type(x).__name__} on {x.device}")
    if x.is_neg() or x.is_conj():
        raise ValueError("the kernels take numbers as they lie in memory, not negated or conjugated views")


class Filled:
    """A structure of the kernels together with the arrays it points into."""

    def __init__(self, struct: Structure, kept: dict[str, Any] | None = None) -> None:
        self.struct = struct
        self.kept = dict(kept or {})

    def with_values(self, **values: Any) -> Filled:
        """A copy with other values: numbers, and contiguous arrays or tensors (or None) that stay alive with it."""
        copy = Filled(type(self.struct).from_buffer_copy(self.struct), self.kept)
        copy._set(values)
        return copy

    def _set(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, np.ndarray | Tensor):
                setattr(self.struct, name, address(value))
            elif not isinstance(value, Filled):  # kept alive for what it points into
                setattr(self.struct, name, value)
                continue
            self.kept[name] = value
