"""What guards the C++ code: structures of one size on both sides, declared arguments, memory that is what it seems."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import numpy as np
import pytest
import torch

from tkn.backends.cpu import structs
from tkn.backends.cpu.build import kernels
from tkn.backends.cpu.kernels import Tiles, fill_gather, pack, run_gather, unpack
from tkn.backends.cpu.rows import Children, Rows
from tkn.backends.cpu.structs import ARGUMENTS, STRUCTURES, DenseStruct, Filled, GatherStruct, address, check_abi


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.compact
def test_the_structures_are_those_of_the_library(dtype: torch.dtype) -> None:
    library = kernels(dtype)
    check_abi(library)
    sizes = (ctypes.c_int64 * len(STRUCTURES))()
    assert library.tkn_struct_sizes(sizes, len(STRUCTURES)) == len(STRUCTURES)
    assert [ctypes.sizeof(structure) for structure in STRUCTURES] == list(sizes)


def test_every_structure_is_checked() -> None:
    mirrored = {
        kind
        for kind in vars(structs).values()
        if isinstance(kind, type) and issubclass(kind, ctypes.Structure) and kind is not ctypes.Structure
    }
    assert mirrored == set(STRUCTURES)


def test_a_structure_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Longer(ctypes.Structure):
        _fields_ = (*DenseStruct._fields_, ("more", ctypes.c_int64))

    others = [Longer if structure is DenseStruct else structure for structure in STRUCTURES]
    monkeypatch.setattr(structs, "STRUCTURES", tuple(others))
    with pytest.raises(RuntimeError, match="Longer takes 64 bytes, not 72"):
        check_abi(kernels(torch.float32))
    monkeypatch.setattr(structs, "STRUCTURES", STRUCTURES[1:])
    with pytest.raises(RuntimeError, match=f"{len(STRUCTURES)} structures, not {len(STRUCTURES) - 1}"):
        check_abi(kernels(torch.float32))


def test_a_library_without_a_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structs, "ARGUMENTS", {**ARGUMENTS, "tkn_other": ()})
    with pytest.raises(RuntimeError, match="no function tkn_other"):
        check_abi(kernels(torch.float32))


def test_declared_arguments_refuse_others() -> None:
    library = kernels(torch.float32)
    check_abi(library)
    with pytest.raises(ctypes.ArgumentError):
        library.tkn_gather(ctypes.byref(DenseStruct()), None, 0, None, 0, 0, 0, 1)
    with pytest.raises(TypeError):
        library.tkn_gather(ctypes.byref(GatherStruct()), None, 0)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((4, 4))[:, ::2],
        torch.zeros(4, 4).t()[:2],
        torch.zeros(3, device="meta"),
        torch.zeros(3).to_sparse(),
        torch.zeros(3, dtype=torch.complex64).conj().imag,
        torch.zeros(3, dtype=torch.complex64).conj(),
    ],
    ids=["array", "tensor", "device", "sparse", "negated", "conjugated"],
)
def test_memory_that_is_not_what_it_seems(values: np.ndarray | torch.Tensor) -> None:
    with pytest.raises(ValueError, match="the kernels take"):
        address(values)
    with pytest.raises(ValueError, match="the kernels take"):
        Filled(DenseStruct()).with_values(rows=values)


def test_the_checks_are_no_asserts() -> None:
    """`python -O` is as safe."""
    code = """
import numpy as np, torch
from tkn.backends.cpu.structs import DenseStruct, Filled, address
for wrong in (np.zeros((4, 4))[:, ::2], torch.zeros(4, 4).t()[:2], torch.zeros(3, device="meta")):
    for use in (address, lambda values: Filled(DenseStruct()).with_values(rows=values)):
        try:
            use(wrong)
        except ValueError as error:
            print(error)
"""
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("the kernels take") == 6


def test_images_of_another_shape_are_not_packed() -> None:
    with pytest.raises(ValueError, match=r"shape \[3, 2, 4, 4\] are not \[3, 2, 4, 5\]"):
        pack(torch.zeros(3, 2, 4, 4), Rows.full(2, (4, 5)), Tiles.of(3, torch.float32))


def test_rows_that_do_not_match_are_refused() -> None:
    rows = Rows.full(2, (3, 3))
    gather = fill_gather(Children.same(rows), child_row=rows.row)
    tiles = Tiles.of(40, torch.float32)
    source = tiles.empty(rows, torch.float32)
    with pytest.raises(ValueError, match=r"rows of torch\.float64"):
        run_gather(gather, source, source.double())
    with pytest.raises(ValueError, match="beside"):
        run_gather(gather, source, source[:-1])


@pytest.mark.compact
def test_negated_images_are_packed_as_they_read() -> None:
    """The imaginary part of a conjugated number is a view of the number's own memory."""
    y = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    x = torch.complex(0 * y, y).conj().imag
    assert x.is_neg()
    rows, tiles = Rows.full(2, (4, 4)), Tiles.of(3, torch.float32)
    assert torch.equal(unpack(pack(x, rows, tiles), rows, 3), -y)


@pytest.mark.compact
def test_a_default_device_is_not_the_kernels() -> None:
    x = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    rows, tiles = Rows.full(2, (4, 4)), Tiles.of(3, torch.float32)
    with torch.device("meta"):
        y = unpack(pack(x, rows, tiles), rows, 3)
    assert torch.equal(y, x)
