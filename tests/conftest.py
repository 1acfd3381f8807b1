"""No test reaches a network."""

from __future__ import annotations

import socket

import pytest
import torch

# The tests' networks are so small that more threads only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = socket.getaddrinfo

    def local_only(host: str, *args: object, **kwargs: object) -> object:
        if host not in ("localhost", "127.0.0.1", "::1"):
            raise OSError(f"a test asked for the address of {host}")
        return resolve(host, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", local_only)
