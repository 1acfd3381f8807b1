"""No test reaches a network, none sees what the engine measured or compiled for this machine's user, and each has the
same random numbers whatever ran before it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

# The tests' networks are so small that more threads only wait for each other; so do those of processes that tests
# start. Lightning sets the number of threads where the environment does not, and torch reads it when it is imported.
os.environ["OMP_NUM_THREADS"] = "1"
# A program that an earlier version of the operators was compiled into, and that lies in a cache, tells nothing of this.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
# Without a GPU its kernels are interpreted. Triton reads this when it is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compact: few and fast: run for other builds of the kernels too")
    config.addinivalue_line("markers", "slow: whole sweeps, or needs packages of optional extras; pytest -m slow")
    # Kept between runs, for compiling takes seconds; processes that tests start inherit it.
    cache = getattr(config, "cache", None)
    folder = tempfile.mkdtemp() if cache is None else str(cache.mkdir("tkn"))
    os.environ["TKN_CACHE_DIR"] = folder


def pytest_sessionstart() -> None:
    # A shell's background jobs ignore it, and so would the runs that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    import torch  # not before its environment is set

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = socket.getaddrinfo

    def local_only(host: str, *args: object, **kwargs: object) -> object:
        if host not in ("localhost", "127.0.0.1", "::1"):
            raise OSError(f"a test asked for the address of {host}")
        return resolve(host, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", local_only)


@pytest.fixture
def wrong_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The one line with which a command's `main` ends for these arguments, leaving no file and no other output.

    In this process: it takes seconds to start one, and a wrong argument ends the command before it runs anything.
    """

    def line(main: Callable[[], None], *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        with pytest.raises(SystemExit) as stopped:
            main()
        line = stopped.value.code
        assert isinstance(line, str)
        assert "\n" not in line
        assert capfd.readouterr() == ("", "")
        assert not list(tmp_path.iterdir())
        return line

    return line
