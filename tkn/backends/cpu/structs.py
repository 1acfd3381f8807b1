"""The kernels' C structures, and how they are filled from arrays."""

from __future__ import annotations

from ctypes import Structure, c_double, c_int32, c_int64, c_void_p
from enum import IntEnum
from typing import Any

import numpy as np
from torch import Tensor

MAX, SUM = 1, 2


class Kind(IntEnum):
    """`Kind` of kernels.cpp: what an operation of a plan is."""

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
        ("relu", c_int32),
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
        ("relu", c_int32),
        ("windows", c_int32),
        ("window_start", c_void_p),
        ("pool", GatherStruct),
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


class OperationStruct(Structure):
    """`Operation` of kernels.cpp."""

    _fields_ = (
        ("kind", c_int32),
        ("dense", c_int32),
        ("spec", c_void_p),
        ("src", c_int64),
        ("dst", c_int64),
        ("parts", c_int32),
    )


class StepStruct(Structure):
    """`Step` of kernels.cpp."""

    _fields_ = (("operation", c_int32), ("begin", c_int32), ("end", c_int32))


class MapPoolStruct(Structure):
    """`MapPool` of maps.h."""

    _fields_ = (
        ("kind", c_int32),
        ("relu", c_int32),
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
        ("child_start", c_void_p),
        ("child", c_void_p),
        ("missing", c_void_p),
        ("outside", c_void_p),
        ("runs", c_int32),
        ("run_offset", c_void_p),
        ("run_length", c_void_p),
        ("weight", c_void_p),
        ("weight_dst", c_int64),
        ("pool", MapPoolStruct),
    )


class MapFirstStruct(Structure):
    """`MapFirst` of maps.h."""

    _fields_ = (
        ("pixels", c_int32),
        ("out", c_void_p),
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
        ("first", c_void_p),
        ("child_start", c_void_p),
        ("child", c_void_p),
        ("children", c_int32),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("sum", c_int32),
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
        ("stride", c_int32),
        ("line", c_int32),
    )


class Filled:
    """A structure of the kernels together with the arrays it points into."""

    def __init__(self, struct: Structure, kept: dict[str, Any] | None = None) -> None:
        self.struct = struct
        self.kept = dict(kept or {})

    def having(self, **values: Any) -> Filled:
        """A copy with other values: numbers, and arrays or tensors (or None) that stay alive with it."""
        copy = Filled(type(self.struct).from_buffer_copy(self.struct), self.kept)
        copy._set(values)
        return copy

    def _set(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                assert value.flags.c_contiguous, name
                setattr(self.struct, name, value.ctypes.data)
            elif isinstance(value, Tensor):
                assert value.is_contiguous(), name
                setattr(self.struct, name, value.data_ptr())
            elif isinstance(value, Filled):
                pass  # kept alive for what it points into
            else:
                setattr(self.struct, name, value)
                continue
            self.kept[name] = value
