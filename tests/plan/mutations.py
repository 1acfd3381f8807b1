"""Plan files that are not what they should be: every field of their JSON, of their header, and their bytes changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from io import BytesIO
from random import Random
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from tkn.plan import file as plan_file
from tkn.plan.decode import DTYPES
from tkn.plan.encode import KINDS
from tkn.plan.file import read_plan
from tkn.plan.guard import guarded
from tkn.plan.vocabulary import VOCABULARY

#: What no field should be, or only some.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, 5, -1, -(2**31), 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**30, 0.5, 1.0, 1e308),
    *(
        "",
        "0",
        "x",
        "x" * 2000,
        "\u0000",
        "expected",
        "input",
        "tkn.plan",
        "../../etc/passwd",
        "__class__",
        "cuda",
        "meta",
    ),
    *([], {}, [[]], [1, 2], [0, 0], [1, 1, 1], [2, 9, 9], [-1, -1], [2**31, 1], list(range(100)), {"": 0}),
    *(
        {"input": 0},
        {"input": 9},
        {"tensor": "1.weight"},
        {"tensor": "expected"},
        {"dtype": "float64"},
        {"slice": [0, 1]},
    ),
    *({"tuple": [1, -1]}, {"dict": {"inplace": True}}, {"ellipsis": True}),
)


def parts(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The header without metadata, the metadata's JSON value, and the numbers."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    content = json.loads(header.pop("__metadata__")[plan_file._KEY])
    return header, content, data[8 + length :]


def whole(header: dict[str, Any], content: Any, numbers: bytes) -> bytes:
    """A file of them."""
    text = content if isinstance(content, str) else json.dumps(content)
    return raw(json.dumps({"__metadata__": {plan_file._KEY: text}, **header}).encode(), numbers)


def raw(header: bytes, numbers: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + numbers


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


class Mutator:
    """Makes changed files of `data`; the same ones for the same seed."""

    def __init__(self, data: bytes, seed: int) -> None:
        self.data, self.random = data, Random(seed)
        self.header, self.content, self.numbers = parts(data)
        self.kinds: list[Callable[[], bytes]] = [
            *(self.field, self.field, self.field, self.fields, self.structure, self.duplicate),
            *(self.offsets, self.spec, self.tensors, self.weights, self.bytes, self.length),
        ]

    def file(self) -> tuple[str, bytes]:
        """A changed file, and how it was changed; in half of those that can still be read what it should compute is
        computed anew."""
        kind = self.random.choice(self.kinds)
        data = kind()
        if self.random.random() < 0.5:
            return f"{kind.__name__}, consistent", consistent(data)
        return kind.__name__, data

    def _changed(self, value: Any) -> Any:
        """Another value in the place of one."""
        r = self.random
        if type(value) is int and r.random() < 0.6:
            return r.choice([value + 1, value - 1, -value, 2 * value, value + 2, 3 - value, 10**6 * value])
        if type(value) is float and r.random() < 0.6:
            return r.choice([-value, 0.0, value * 2, value + 1, 1e-30, 1e30])
        if isinstance(value, str) and r.random() < 0.6:
            return r.choice([*KINDS.values(), *VOCABULARY, *self.header, *DTYPES, "gaussian", "cauchy"])
        if type(value) is bool:
            return not value
        return copy.deepcopy(r.choice(ODD))

    def field(self) -> bytes:
        content = copy.deepcopy(self.content)
        self._change(content)
        return whole(self.header, content, self.numbers)

    def fields(self) -> bytes:
        content = copy.deepcopy(self.content)
        for _ in range(self.random.randint(2, 6)):
            self._change(content)
        return whole(self.header, content, self.numbers)

    def _change(self, content: Any) -> None:
        path = self.random.choice(places(content)[1:])
        holder = at(content, path[:-1])
        holder[path[-1]] = self._changed(holder[path[-1]])

    def structure(self) -> bytes:
        """Something left out, repeated, moved, added or put elsewhere."""
        content, r = copy.deepcopy(self.content), self.random
        path = r.choice(places(content)[1:])
        holder, key = at(content, path[:-1]), path[-1]
        action = r.choice(["delete", "repeat", "swap", "add", "elsewhere"])
        if action == "delete":
            del holder[key]
        elif action == "elsewhere":
            holder[key] = copy.deepcopy(at(self.content, r.choice(places(self.content)[1:])))
        elif isinstance(holder, dict):
            holder[r.choice(["extra", "inplace", "out", "training", "dim", "size"])] = self._changed(holder[key])
        elif action == "repeat":
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            other = r.randrange(len(holder))
            holder[key], holder[other] = holder[other], holder[key]
        return whole(self.header, content, self.numbers)

    def duplicate(self) -> bytes:
        """A name twice in one object."""
        text = json.dumps(self.content)
        name = self.random.choice(["version", "nodes", "batch_size", "size", "inputs", "weight"])
        return whole(
            self.header,
            text.replace(f'"{name}":', f'"{name}": {json.dumps(self._changed(1))}, "{name}":', 1),
            self.numbers,
        )

    def offsets(self) -> bytes:
        header = copy.deepcopy(self.header)
        name = self.random.choice(list(header))
        begin, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = self.random.choice(
            [
                [begin, end + 4],
                [begin + 4, end],
                [end, begin],
                [-4, end],
                [begin, 2**40],
                [0, 2**63],
                [begin],
                [0, 0],
                "0",
            ]
        )
        return whole(header, self.content, self.numbers)

    def spec(self) -> bytes:
        """A tensor of another type or shape."""
        header, r = copy.deepcopy(self.header), self.random
        tensor = header[r.choice(list(header))]
        if r.random() < 0.5:
            tensor["dtype"] = r.choice(["F16", "F32", "F64", "I32", "U8", "I64", "BF16", "C64", "F8_E4M3", "X", 3])
        else:
            shape = tensor["shape"]
            tensor["shape"] = r.choice(
                [shape[::-1], [*shape, 1], [1, *shape], shape[1:], [0], [2**40], [-1], [2**32] * 2, []]
            )
        return whole(header, self.content, self.numbers)

    def tensors(self) -> bytes:
        """Tensors missing, more, or under each other's names."""
        tensors, r = safetensors.torch.load(self.data), self.random
        one, other = r.sample(list(tensors), 2)
        if r.random() < 0.3:
            del tensors[one]
        elif r.random() < 0.4:
            tensors[r.choice(["extra", "", "0.weight", "99.value"])] = torch.zeros(r.choice([0, 1, 7]))
        elif r.random() < 0.5:
            tensors[one], tensors[other] = tensors[other], tensors[one]
        else:
            kind = r.choice([torch.float16, torch.float64, torch.float32, torch.int64, torch.bool])
            tensors[one] = tensors[one].to(kind)
        return safetensors.torch.save(tensors, {plan_file._KEY: json.dumps(self.content)})

    def weights(self) -> bytes:
        """Other numbers in the tensors."""
        tensors, r = safetensors.torch.load(self.data), self.random
        for name in r.sample(list(tensors), r.randint(1, 3)):
            flat = tensors[name].view(-1)
            values = [0.0, -1.0, 1e-40, 1e38, -1e38, torch.nan, torch.inf, -torch.inf, 0.5, 1.0, 1e6]
            if not flat.is_floating_point():
                values = [0, 1, 2, -1, 2**31, 2**62, -(2**63)]
            for _ in range(r.randint(1, 3)):
                flat[r.randrange(len(flat))] = r.choice(values)
        return safetensors.torch.save(tensors, {plan_file._KEY: json.dumps(self.content)})

    def bytes(self) -> bytes:
        data, r = bytearray(self.data), self.random
        end = r.choice([8, 200, len(data) - len(self.numbers), len(data)])
        for _ in range(r.choice([1, 1, 4, 40])):
            data[r.randrange(end)] = r.randrange(256)
        return bytes(data)

    def length(self) -> bytes:
        r = self.random
        if r.random() < 0.5:
            return self.data[: r.randrange(len(self.data))]
        if r.random() < 0.5:
            return self.data + r.randbytes(r.choice([1, 8, 1000]))
        length = r.choice([0, 1, 7, len(self.data), len(self.data) - 8, 2**31, 2**63, 2**64 - 1])
        return length.to_bytes(8, "little") + self.data[8:]


def consistent(data: bytes) -> bytes:
    """The file with what it should compute computed anew, if it can be."""
    try:
        contents = read_plan(BytesIO(data), len(data), "it")
        outputs = computed(contents.graph)
    except ValueError:
        return data
    tensors = safetensors.torch.load(data)
    for name, output in zip(plan_file._expected(len(outputs)), outputs, strict=True):
        tensors[name] = output.contiguous()
    return safetensors.torch.save(tensors, {plan_file._KEY: json.dumps(parts(data)[1])})


def computed(graph: Any) -> list[Tensor]:
    inputs = [plan_file.fixed_images(plan_file._IMAGES, shape) for shape in graph.input_shapes]
    try:
        return guarded(graph, inputs, 2**24)
    except Exception as error:  # torch's functions raise many kinds
        raise ValueError(str(error)) from error
