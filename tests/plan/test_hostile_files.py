"""Plan files made to take memory or time: what reading them takes is bounded by their size."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from engine_cases import new_python
from mutations import raw
from torch import Tensor

from tkn import load_plan
from tkn.plan import file as plan_file

ROOM = 64 * 2**20
#: Loads files; how much memory that took at most, bytes, and what came of it.
PROGRAM = """
import json, sys
import tkn
from pathlib import Path

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

def load(path):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    try:
        plan = tkn.load_plan(path)
        outcome = "plan"
    except ValueError as error:
        outcome = str(error)
    return status("VmHWM") - before, outcome

folder = Path(FOLDER)
load(folder / "first")  # what libraries load at their first use
print(json.dumps({path.name: load(path) for path in sorted(folder.iterdir())}))
"""


def node(operation: str, inputs: list[int], size: Any, flat: bool = False, **own: Any) -> dict[str, Any]:
    return {"name": operation, "operation": operation, "inputs": inputs, "size": size, "flat": flat, **own}


def call(function: str, inputs: list[int], size: Any, *args: Any, flat: bool = False, **kwargs: Any) -> dict[str, Any]:
    own = {"function": function, "kind": function, "args": list(args), "kwargs": kwargs}
    return node("call", inputs, size, flat, **own)


X = {"input": 0}


def content(size: list[int], *nodes: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": "tkn.plan",
        "version": 2,
        "batch_size": 2,
        "input_size": size,
        "nodes": [node("input", [], size), *nodes],
        "output": len(nodes),
        "classes": None,
        "preprocessing": None,
    }


def file(value: Any, **tensors: Tensor) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value)
    return safetensors.torch.save({"expected": torch.zeros(2, 1), **tensors}, {"tkn.plan": text})


def convolve(source: list[int], size: list[int], **sides: list[int]) -> dict[str, Any]:
    geometry = {"kernel": [1, 1], "stride": [1, 1], "before": [0, 0], "after": [0, 0], "dilation": [1, 1], **sides}
    return node("convolve", source, size, weight="weight", bias=None, groups=1, attention=None, **geometry)


ONE = torch.ones(1, 1, 1, 1)
PIXEL = [1, 1, 1]
#: name: a file that asks for more than it may have, or takes as much as it can
HOSTILE: dict[str, bytes] = {
    "first": file(content([1, 4, 4], call("functional.gelu", [0], [1, 4, 4], X))),
    "image": file(content([1, 2**14, 2**14], node("relu", [0], [1, 2**14, 2**14]))),
    "padding": file(
        content(PIXEL, convolve([0], [1, 15001, 15001], before=[7500, 7500], after=[7500, 7500])), weight=ONE
    ),
    "padding and stride": file(
        content(PIXEL, convolve([0], [1, 2, 2], before=[15000, 15000], after=[0, 0], stride=[15000, 15000])), weight=ONE
    ),
    "pooling": file(
        content(
            PIXEL,
            node(
                *("pool", [0], [1, 2, 2]),
                average=False,
                **{"kernel": [2**30 - 1] * 2, "stride": [1, 1], "before": [2**29 - 1] * 2, "after": [2**29 - 1] * 2},
                dilation=[1, 1],
            ),
        )
    ),
    "interpolation": file(content(PIXEL, call("functional.interpolate", [0], [1, 20000, 20000], X, [20000, 20000]))),
    "resize": file(
        content(
            PIXEL,
            node(
                *("resize", [0], [1, 20000, 20000]),
                **{"output": [20000, 20000], "bilinear": True, "align_corners": False, "factors": [None, None]},
            ),
        )
    ),
    "adaptive": file(
        content(PIXEL, node("adaptive_pool", [0], [1, 20000, 20000], average=False, output=[20000, 20000]))
    ),
    "select": file(
        content([1, 500, 500], node("select", [0], [4000, 500, 500], channels="c")),
        c=torch.zeros(4000, dtype=torch.int64),
    ),
    "factor": file(content(PIXEL, call("functional.interpolate", [0], None, X, scale_factor=1e300))),
    "pad": file(content(PIXEL, call("functional.pad", [0], [1, 1, 2**30], X, [2**30 - 1, 0]))),
    "pool to": file(content(PIXEL, call("functional.adaptive_avg_pool2d", [0], None, X, 30000))),
    "grid": file(
        content(
            [6, 1, 1],
            call("Tensor.view", [0], None, X, -1, 2, 3),
            call("functional.affine_grid", [1], None, X, [2, 1, 20000, 20000]),
        )
    ),
    "expand": file(content(PIXEL, call("Tensor.expand", [0], None, X, -1, -1, 2**20, 2**20))),
    "expand again": file(
        content(
            PIXEL,
            *(call("Tensor.unsqueeze", [n], None, X, 0) for n in range(1)),
            call("Tensor.expand", [1], None, X, 2**30, -1, -1, -1, -1),
            call("Tensor.contiguous", [2], None, X),
        )
    ),
    "broadcast": file(
        content(
            [1, 1, 30000],
            call("Tensor.transpose", [0], [1, 30000, 1], X, 2, 3),
            call("operator.add", [0, 1], [1, 30000, 30000], X, {"input": 1}),
        )
    ),
    "matrices": file(
        content([1, 1000, 1000], call("torch.matmul", [0], None, X, {"tensor": "1.w"})),
        **{"1.w": torch.zeros(1, 2000, 1000, 1)},
    ),
    "windows": file(
        content(
            [4, 1000, 1000],
            call("tkn.attend", [0], None, X, {"tensor": "l"}, {"tensor": "l"}, None, "cauchy", 0.5, True),
        ),
        l=torch.ones(2, 100_000),
    ),
    "back": file(
        content([1, 100, 100], call("functional.conv_transpose2d", [0], None, X, {"tensor": "w"}, dilation=[1, 2])),
        w=torch.zeros(1, 1, 1000, 1000),
    ),
    "wide": file(
        content([1, 100, 100], call("functional.conv2d", [0], None, X, {"tensor": "w"}, padding=[500, 500])),
        w=torch.zeros(1, 1, 1000, 1000),
    ),
    "doubling": file(
        content(
            [1, 64, 64],
            *(call("torch.cat", [n], [2 ** (n + 1), 64, 64], [X, X], 1) for n in range(18)),
        )
    ),
    "numbers": file(
        content(
            PIXEL,
            call("Tensor.size", [0], None, X, 0),
            *(call("operator.mul", [n], None, X, X) for n in range(1, 90)),
        )
    ),
    "lists": file(
        content(
            PIXEL, call("Tensor.size", [0], None, X), *(call("operator.add", [n], None, X, X) for n in range(1, 60))
        )
    ),
    "large": file(
        content(
            [1000, 1, 1],
            node(
                "convolve",
                [0],
                [10_000, 1, 1],
                weight="weight",
                bias=None,
                groups=1,
                attention=None,
                kernel=[1, 1],
                stride=[1, 1],
                before=[0, 0],
                after=[0, 0],
                dilation=[1, 1],
            ),
        ),
        weight=torch.ones(10_000, 1000, 1, 1),
    ),
    "fits": file(content([1, 640, 640], *(node("relu", [n], [1, 640, 640]) for n in range(3)))),
    "fits, convolved": file(
        content([8, 170, 170], {**convolve([0], [8, 170, 170], kernel=[3, 3], before=[1, 1], after=[1, 1])}),
        weight=torch.ones(8, 8, 3, 3),
    ),
    "brackets": file("[" * 1_000_000),
    "empty lists": file("[" + "[]," * 340_000 + "[]]"),
    "header of lists": raw(b'{"__metadata__":[' + b"[]," * 340_000 + b"[]]}", b""),
    "long header": raw(b'{"__metadata__":' + b" " * 2**24 + b"{}}", b""),
    "many tensors": raw(
        json.dumps({f"{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(15_000)}).encode(),
        b"",
    ),
    "many nodes": file(content([1, 8, 8], *(node("relu", [n], [1, 8, 8]) for n in range(9_000)))),
    "notes": file({**content(PIXEL), "classes": ["a"] * 150_000}),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux does")
def test_memory_while_loading(tmp_path: Path) -> None:
    for name, data in HOSTILE.items():
        (tmp_path / name).write_bytes(data)
    taken = new_python(f"FOLDER = {str(tmp_path)!r}\n" + PROGRAM)
    assert set(taken) == set(HOSTILE)
    for name, (most, outcome) in taken.items():
        assert most <= 2 * len(HOSTILE[name]) + ROOM, f"{name}: {most / 2**20:.0f} MiB ({outcome})"


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "first"])
def test_what_was_put_off_is_refused_at_the_first_call(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of these files says rightly what it computes, and a machine has only so much memory."""
    monkeypatch.setattr(plan_file, "half_of_memory", lambda: 2**27)
    (tmp_path / "net.plan").write_bytes(HOSTILE[name])

    def use() -> None:
        plan = load_plan(tmp_path / "net.plan")
        plan(torch.zeros(()).expand(1, *plan.input_size))

    with pytest.raises(ValueError, match=r"net\.plan (is damaged|can't be checked|is not a plan)"):
        use()


def test_what_was_put_off_is_done_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_file, "half_of_memory", lambda: 2**27)
    (tmp_path / "net.plan").write_bytes(HOSTILE["interpolation"])
    plan = load_plan(tmp_path / "net.plan")
    for use in (lambda: plan.save(tmp_path / "again.plan"), lambda: copy.deepcopy(plan)):
        with pytest.raises(ValueError, match="can't be checked"):
            use()
    with pytest.raises(ValueError, match="checked at its first use: call it on images before it is traced"):
        torch.func.vmap(plan)(torch.zeros(2, 1, 1, 1, 1))
