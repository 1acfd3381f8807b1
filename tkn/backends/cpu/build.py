"""The kernels of csrc/: compiled and checked once on a machine, in a process of their own, and then opened.

What the compiler makes may be wrong or no instruction of this CPU: then a child process ends, and here torch computes.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from tkn.app.messages import message
from tkn.backends.cpu.structs import check_abi

_log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "csrc" / "kernels.cpp"
#: Compiler flags beyond the engine's own, e.g. "-mno-avx512f" to build the AVX2 kernels on a CPU with AVX-512.
FLAGS_VARIABLE = "TKN_ENGINE_CFLAGS"
#: Where compiled kernels and measurements are kept.
CACHE_VARIABLE = "TKN_CACHE_DIR"

_REAL = {torch.float32: "float", torch.float64: "double"}


#: How long another process may take that compiles the same, and how long a child may.
_PATIENCE = 900
#: In the place of a cache folder that can't be written: one of this process.
_own_cache: list[Path] = []


class EngineUnavailable(RuntimeError):
    """The kernels could not be built, or failed their check, on this machine."""


def cache_dir() -> Path:
    """TKN_CACHE_DIR, or tkn in the user's cache folder; where that can't be written, a folder of this process alone."""
    if _own_cache:
        return _own_cache[0]
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


@cache
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
    return _fingerprint(SOURCE, *_flags(dtype), _cpu(), os.environ.get("CXX", ""), torch.__version__)


@cache
def _fingerprint(source: Path, *parts: str) -> str:
    sources = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    return hashlib.sha256("\0".join([*sources, *parts]).encode()).hexdigest()[:16]


def folder(dtype: torch.dtype) -> Path:
    """Where the kernels for `dtype` of this source, CPU and torch are kept."""
    return cache_dir() / f"tkn_engine_{_REAL[dtype]}_{fingerprint(dtype)}"


def compile_kernels(dtype: torch.dtype) -> Path:
    """Compile the kernels and return the library's path; it raises what the compiler has to say. For the child process:
    it changes PATH and a logger."""
    # It warns of a CUDA compiler that it did not find, and that nothing here needs.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import ninja
    from torch.utils import cpp_extension

    here = folder(dtype)
    here.mkdir(parents=True, exist_ok=True)
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
        here.name,
        [str(SOURCE)],
        extra_cflags=flags,
        extra_ldflags=link,
        build_directory=str(here),
        is_python_module=False,
    )
    return _library(dtype)


def _library(dtype: torch.dtype) -> Path:
    return folder(dtype) / f"{folder(dtype).name}.so"


def checked_mark(dtype: torch.dtype) -> Path:
    """The file that says that the kernels passed their check."""
    return folder(dtype) / "checked"


def factors_file() -> Path:
    """Where the machine's factors of the cost model are kept, beside the kernels that they hold for."""
    return folder(torch.float32) / "factors.json"


def use(dtype: torch.dtype, path: Path) -> None:
    """Compute with the library at `path` from now on. OSError if it is none, RuntimeError for other structures."""
    library = ctypes.CDLL(str(path))
    check_abi(library)
    _loaded[dtype] = library


def run_in_child(module: str, *arguments: str) -> str | None:
    """Run `python -m module arguments` in a process of its own: None if it ends well, else what went wrong."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        CACHE_VARIABLE: str(cache_dir()),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_PATIENCE,
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return f"a process for them could not run: {message(error)}"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"their check was ended by {signal.Signals(-done.returncode).name}"
    lines = done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["no word of why"]
    return lines[-1][:400]


def _open(dtype: torch.dtype) -> None:
    """Make the kernels usable, compiled and checked if need be. EngineUnavailable with the reason."""
    try:
        with _alone():
            if not _opened(dtype):
                _log.info("compiling the ROI engine's kernels into %s (once)", folder(dtype))
                wrong = run_in_child("tkn.backends.cpu.check", str(dtype).removeprefix("torch."))
                if wrong is not None:
                    raise EngineUnavailable(wrong)
                if not _opened(dtype):
                    raise EngineUnavailable("they were compiled and checked, and could not be opened")
    except Timeout as error:
        raise EngineUnavailable(f"another process compiles them for {_PATIENCE} seconds already") from error


def _opened(dtype: torch.dtype) -> bool:
    """Whether checked kernels were there to be opened; what is damaged is cleared away."""
    if not checked_mark(dtype).is_file():
        return False
    try:
        use(dtype, _library(dtype))
    except (OSError, RuntimeError):
        shutil.rmtree(folder(dtype), ignore_errors=True)
        return False
    return True


def _alone() -> FileLock:
    """A lock that keeps other processes from compiling in the same cache folder."""
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_dir()):
            pass
    except OSError as error:
        _log.info("%s can't be written (%s): the kernels are compiled for this process alone", cache_dir(), error)
        _own_cache.append(Path(tempfile.mkdtemp(prefix="tkn-")))
        atexit.register(shutil.rmtree, _own_cache[0], ignore_errors=True)
    return FileLock(cache_dir() / "compiling.lock", timeout=_PATIENCE)


_loaded: dict[torch.dtype, ctypes.CDLL] = {}
_unavailable: dict[torch.dtype, str] = {}
_lock = threading.RLock()


def available(dtype: torch.dtype, *, may_build: bool = True) -> bool:
    """Whether there are kernels for `dtype` here. At a machine's first question they are compiled and checked, if
    `may_build`, in a process of their own, which takes seconds; there is one warning if that fails."""
    if dtype in _loaded:
        return True
    if dtype not in _REAL:
        return False
    with _lock:
        if dtype in _loaded or dtype in _unavailable or (not may_build and not _opened(dtype)):
            return dtype in _loaded
        try:
            _open(dtype)
        except EngineUnavailable as error:
            _unavailable[dtype] = str(error)
            warnings.warn(
                f"the ROI engine is not available, torch computes instead (same results, slower): {error}", stacklevel=2
            )
        return dtype in _loaded


def kernels(dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled kernels for float32 or float64. EngineUnavailable where there are none."""
    if not available(dtype):
        raise EngineUnavailable(_unavailable.get(dtype, f"there are no kernels for {dtype}"))
    return _loaded[dtype]


#: What products of bfloat16 need, as Linux names it.
_BFLOAT16_FLAGS = ("avx512bw", "avx512vl", "avx512_bf16", "avx512_vbmi2")


def without_bfloat16() -> str | None:
    """What is missing here for products of bfloat16; None if they can be computed."""
    if not available(torch.float32):
        return "the engine's kernels, which are not available on this machine"
    if kernels(torch.float32).tkn_bfloat16():
        return None
    lacking = [flag for flag in _BFLOAT16_FLAGS if flag not in _cpu().split()]
    if lacking:
        return f"a CPU with {', '.join(_BFLOAT16_FLAGS)}; this one lacks {', '.join(lacking)}"
    return f"kernels that use {', '.join(_BFLOAT16_FLAGS)}; those here were compiled without"
