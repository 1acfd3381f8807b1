"""A plan's file: safetensors whose metadata holds the graph as JSON. Data only, and checked when it is read."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from io import BytesIO
from math import prod
from typing import Any, BinaryIO, NoReturn

import safetensors.torch
from torch import Tensor

from tkn.app.messages import first_line
from tkn.plan.compare import TOLERANCE, difference, fixed_images
from tkn.plan.decode import decoded, fields, whole
from tkn.plan.encode import encoded
from tkn.plan.graph import Graph
from tkn.plan.guard import NoRoom, guarded, half_of_memory

#: The metadata's only key, the format's name, and its version.
_KEY = _FORMAT = "tkn.plan"
_VERSION = 2
_FIELDS = ("format", "version", "batch_size", "input_size", "nodes", "output", "classes", "preprocessing")
#: The tensor of the outputs for `fixed_images`, of so many.
_EXPECTED, _IMAGES = "expected", 2
#: A header may be so long, and by this part of the file longer: as Python objects JSON takes forty times its length.
_HEADER, _HEADER_SHARE = 2**20, 64
#: What reading may take beyond twice the file, bytes; the file's own numbers are one of the two.
_ROOM = 48 * 2**20
#: What making a number of the fixed images takes, bytes.
_IMAGE_BYTES = 48
#: Older plans were written by torch.save, as zip archives.
_ZIP = b"PK\x03\x04"


@dataclass
class Contents:
    """What a file of `size` bytes holds. `expected`: the graph's outputs for the fixed images."""

    graph: Graph
    batch_size: int
    classes: Any
    preprocessing: Any
    expected: Tensor
    size: int

    def check_now(self, name: str) -> bool:
        """`check` it in the memory that reading a file may take; False if that may not be enough."""
        try:
            self.check(name, self.size + _ROOM)
        except NoRoom:
            return False
        return True

    def check(self, name: str, room: int | None = None) -> None:
        """ValueError, with the file's name, if the graph does not compute the outputs that it should.

        NoRoom if that may take more than `room` bytes; by default, half of the machine's memory: ValueError.
        """
        try:
            error = difference(_outputs(self.graph, room or half_of_memory()), self.expected)
        except NoRoom:
            if room is not None:
                raise
            raise ValueError(f"{name} can't be checked: it may take more than half of the memory") from None
        except Exception as cause:  # torch's functions raise many kinds
            raise ValueError(f"{name} is damaged: {first_line(cause)}") from cause
        if error > TOLERANCE:
            raise ValueError(f"{name} is damaged: it does not compute what it should (difference {error:.1e})")


def json_value(name: str, value: Any) -> Any:
    """A copy of a JSON value; ValueError that names it if it is none."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be a JSON value: {first_line(error)}") from error


def plan_bytes(graph: Graph, batch_size: int, classes: Any, preprocessing: Any) -> bytes:
    """A file's content; ValueError that names what files can't hold."""
    nodes, tensors = encoded(graph)
    tensors[_EXPECTED] = _outputs(graph, sys.maxsize).contiguous()
    values = (_FORMAT, _VERSION, batch_size, list(graph.input_size), nodes, graph.output, classes, preprocessing)
    text = json.dumps(dict(zip(_FIELDS, values, strict=True)), allow_nan=False, separators=(",", ":"))
    data = safetensors.torch.save(tensors, {_KEY: text})
    length = int.from_bytes(data[:8], "little")
    if length > _longest_header(len(data)):
        raise ValueError(
            f"the plan can't be saved: its description takes {length} bytes, too many for a file to be read"
        )
    try:
        read_plan(BytesIO(data), len(data), "the plan").check("the plan", sys.maxsize)
    except ValueError as error:
        raise ValueError(f"the plan can't be saved, for it would not be the same when loaded: {error}") from error
    return data


def _longest_header(size: int) -> int:
    """Of a file of `size` bytes."""
    return _HEADER + size // _HEADER_SHARE


def _outputs(graph: Graph, room: int) -> Tensor:
    if _IMAGES * prod(graph.input_size) * _IMAGE_BYTES > room:
        raise NoRoom
    return guarded(graph, fixed_images(_IMAGES, graph.input_size), room)


def read_plan(file: BinaryIO, size: int, name: str) -> Contents:
    """What a file of `size` bytes holds; ValueError, with its name, if it is no plan, damaged or of another version.

    It takes no more memory than twice the file's size and 64 MiB. Its graph is not computed yet: see `Contents.check`.
    """
    try:
        return _contents(*_opened(file, size), size)
    except _Foreign as error:
        raise ValueError(f"{name} is {error}") from None
    except OSError:
        raise
    except Exception as error:  # the libraries raise many kinds
        raise ValueError(f"{name} is damaged or not a plan: {first_line(error)}") from error


class _Foreign(Exception):
    """A file of which something better can be said than that it is damaged."""


def _opened(file: BinaryIO, size: int) -> tuple[str, dict[str, Tensor]]:
    """The JSON text and the tensors."""
    start = file.read(8)
    if start.startswith(_ZIP):
        raise _Foreign("a plan of an earlier version, or none: make it anew with tkn.accelerate")
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, _longest_header(size)):
        raise ValueError(f"it has no header of {length} bytes")
    # Read apart from the rest, which takes memory of its own.
    header = _json(file.read(length).decode())
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or _KEY not in metadata:
        raise _Foreign("not a plan")
    (text,) = fields(metadata, _KEY)
    del header, metadata
    file.seek(0)
    data = file.read(size + 1)
    if len(data) != size:
        raise ValueError("it changed while it was read")
    return text, safetensors.torch.load(data)


def _contents(text: str, tensors: dict[str, Tensor], size: int) -> Contents:
    value = _json(text)
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise _Foreign("not a plan")
    version = whole(value.get("version"), 1)
    if version != _VERSION:
        other = "a newer" if version > _VERSION else "an earlier"
        raise _Foreign(f"a plan of {other} version ({version}, not {_VERSION}): {_ADVICE[other]}")
    _, _, batch_size, input_size, nodes, output, classes, preprocessing = fields(value, *_FIELDS)
    batch_size = whole(batch_size, 1)
    expected = tensors.pop(_EXPECTED, None)
    if expected is None:
        raise ValueError("it does not say what it should compute")
    graph = decoded(nodes, output, tensors)
    if input_size != list(graph.input_size):
        raise ValueError("its images have two sizes")
    return Contents(graph, batch_size, classes, preprocessing, expected, size)


_ADVICE = {"a newer": "it needs a newer tkn", "an earlier": "make it anew with tkn.accelerate"}


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name comes twice in an object")
    return values


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
