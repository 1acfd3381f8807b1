"""The GPU's kernels as machine code, made without a GPU: that they build, and where the matrix units are used."""

from __future__ import annotations

from engine_cases import new_python

CODE = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tkn.backends.cuda import lists, packing, pooling, product

SIZES = {"TILE": 64, "DEPTH": 64, "COLUMNS": 64, "NUMBERS": 32, "IMAGES": 32, "ROWS": 8, "PIXELS": 16, "CHANNELS": 32,
         "CHUNK": 32, "COUNT": 4, "WIDE": 4, "PARTS": 2}
FLAGS = {"SCALE": True, "SHIFT": True, "RELU": True, "KEEP": True, "AVERAGE": False, "LAST": True}
INTEGERS = {"rows", "first", "channel", "live", "tile_of", "pixel", "row", "child", "box", "box_first", "offset",
            "number", "total", "row_first", "bounds", "out_row", "in_row", "in_first", "out_pixel", "out_channel",
            "in_pixel", "in_channel"}
SINGLE = {"window", "scale", "shift", "parts_of", "of_packed", "result", "of_window", "sums"}
NUMBERS = {"x", "y", "z", "packed", "weight", "grad", "of_z"}

def type_of(name, numbers):
    for names, pointer in ((INTEGERS, "i32"), (SINGLE, "fp32"), (NUMBERS, numbers), ({"kept"}, "i8")):
        if name in names:
            return f"*{pointer}"
    return "fp32" if name == "share" else "i32"

def compiled(kernel, numbers, target, **constants):
    constants = {name: value for name, value in {**SIZES, **FLAGS, **constants}.items() if name in kernel.arg_names}
    types = {}
    for name in kernel.arg_names:
        types[name] = "constexpr" if name in constants else type_of(name, numbers)
    aligned = [n for n, name in enumerate(kernel.arg_names) if types[name].startswith("*") or name == "images"]
    source = ASTSource(fn=kernel, signature=types, attrs={(n,): [["tt.divisibility", 16]] for n in aligned},
                       constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": 4}).asm["ptx"]

found = {}
for target in (80, 90):
    for module in (lists, packing, pooling):
        for name, kernel in vars(module).items():
            if name.endswith("_kernel"):
                assert "ret;" in compiled(kernel, "bf16", target, FLIP=True), name
    for flip in (False, True):
        assert "ret;" in compiled(product._pack_kernel, "fp16", target, FLIP=flip)
    assert "ret;" in compiled(product._gather_gradient_kernel, "bf16", target)
    assert "ret;" in compiled(product._sum_kernel, "bf16", target)
    for kernel in (product._product_kernel, product._packed_gradient_kernel):
        for numbers, tf32 in (("bf16", False), ("fp16", False), ("fp32", True), ("fp32", False)):
            code = compiled(kernel, numbers, target, TF32=tf32, DEPTH=64 if numbers != "fp32" else 32)
            units = "wgmma" if "wgmma.mma_async" in code else "mma" if "mma.sync" in code else "none"
            found[f"{target} {numbers} {tf32}"] = found.get(f"{target} {numbers} {tf32}", []) + [units]
print(json.dumps(found))
"""


def test_built_for_two_kinds_of_gpus() -> None:
    found = new_python(CODE, TRITON_INTERPRET="0")
    for target, units in ((80, "mma"), (90, "wgmma")):
        for numbers in ("bf16 False", "fp16 False", "fp32 True"):
            assert found[f"{target} {numbers}"] == [units, units], numbers
        # Products of float32 that are not rounded have no matrix unit.
        assert found[f"{target} fp32 False"] == ["none", "none"]
