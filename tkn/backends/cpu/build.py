"""Compiling kernels.cpp at first use, and keeping the result."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import threading
import warnings
from pathlib import Path

import ninja
import torch

from tkn.app.messages import message

_log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "csrc" / "kernels.cpp"
_HEADERS = tuple(SOURCE.with_name(name) for name in ("vector.h", "rows.h", "bfloat16.h", "weight_grad.h", "maps.h"))
#: Compiler flags beyond the engine's own, e.g. "-mno-avx512f" to build the AVX2 kernels on a CPU with AVX-512.
FLAGS_VARIABLE = "TKN_ENGINE_CFLAGS"
#: Where compiled kernels and measurements are kept.
CACHE_VARIABLE = "TKN_CACHE_DIR"

_REAL = {torch.float32: "float", torch.float64: "double"}


class EngineUnavailable(RuntimeError):
    """The kernels could not be built, or failed their check, on this machine."""


def cache_dir() -> Path:
    """TKN_CACHE_DIR, or tkn in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tkn"


def _flags(dtype: torch.dtype) -> list[str]:
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    # No -ffast-math: NaN and infinity must come out as torch's. Without traps and errno the loops still vectorise.
    return [
        "-std=c++20",
        "-O3",
        native,
        *wide,
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fopenmp",
        f"-DREAL={_REAL[dtype]}",
        *os.environ.get(FLAGS_VARIABLE, "").split(),
    ]


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def fingerprint(dtype: torch.dtype) -> str:
    """Names a build: it changes with the source, the flags, the CPU, the compiler's name and torch."""
    sources = [path.read_text(encoding="utf-8") for path in (SOURCE, *_HEADERS)]
    parts = [*sources, *_flags(dtype), _cpu(), os.environ.get("CXX", ""), torch.__version__]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _build(dtype: torch.dtype, folder: Path) -> Path:
    # It warns of a CUDA compiler that it did not find, and that nothing here needs.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils import cpp_extension  # slow to import

    folder.mkdir(parents=True, exist_ok=True)
    _log.info("compiling the ROI engine's kernels into %s (once)", folder)
    flags = _flags(dtype)
    # Also in a virtual environment that is not activated.
    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])
    # torch's own OpenMP, so that both share one pool of threads.
    torch_lib = Path(torch.__file__).parent / "lib"
    openmp = sorted(torch_lib.glob("libgomp*.so*"))
    link = [
        "-fopenmp",
        *(str(path) for path in openmp[:1]),
        f"-Wl,-rpath,{torch_lib}",
        *(f for f in flags if f.startswith("-fsan")),
    ]
    cpp_extension.load(
        folder.name,
        [str(SOURCE)],
        extra_cflags=flags,
        extra_ldflags=link,
        build_directory=str(folder),
        is_python_module=False,
    )
    return folder / f"{folder.name}.so"


def _open(dtype: torch.dtype) -> ctypes.CDLL:
    name = f"tkn_engine_{_REAL[dtype]}_{fingerprint(dtype)}"
    folder = cache_dir() / name
    passed = folder / "checked"
    if passed.is_file():
        try:
            return ctypes.CDLL(str(folder / f"{name}.so"))
        except OSError:  # damaged: build it anew
            shutil.rmtree(folder, ignore_errors=True)
    try:
        library = ctypes.CDLL(str(_build(dtype, folder)))
    except Exception as error:  # no compiler, no ninja, an unknown CPU, an unwritable folder
        detail = message(error)
        raise EngineUnavailable(f"the kernels could not be compiled: {detail[:400]}") from error
    # Late: the check uses the kernels.
    from tkn.backends.cpu.check import check_kernels

    _loaded[dtype] = library
    try:
        check_kernels(dtype)
    except Exception as error:
        raise EngineUnavailable(f"the compiled kernels did not pass their check: {error}") from error
    finally:
        del _loaded[dtype]
    passed.touch()
    return library


_loaded: dict[torch.dtype, ctypes.CDLL] = {}
_unavailable: dict[torch.dtype, str] = {}
_lock = threading.RLock()


def available(dtype: torch.dtype) -> bool:
    """Whether there are kernels for `dtype` here. Compiles and checks them at the first question, which takes seconds;
    warns, once, if that fails."""
    if dtype not in _REAL:
        return False
    with _lock:
        if dtype not in _loaded and dtype not in _unavailable:
            try:
                _loaded[dtype] = _open(dtype)
            except EngineUnavailable as error:
                _unavailable[dtype] = str(error)
                warnings.warn(
                    f"the ROI engine is not available, torch computes instead (same results, slower): {error}",
                    stacklevel=2,
                )
        return dtype in _loaded


def kernels(dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled kernels for float32 or float64. EngineUnavailable where there are none."""
    if not available(dtype):
        raise EngineUnavailable(_unavailable.get(dtype, f"there are no kernels for {dtype}"))
    return _loaded[dtype]
