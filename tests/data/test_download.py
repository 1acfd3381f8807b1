"""`fetch`, from file addresses and a silent local port: whole files or none, and errors that say what went wrong."""

import hashlib
import io
import socket
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from tkn.data.download import CHUNK_BYTES, fetch

CONTENT = np.random.default_rng(0).bytes(2 * CHUNK_BYTES + 17)
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def url(tmp_path: Path) -> str:
    served = tmp_path / "served.bin"
    served.write_bytes(CONTENT)
    return served.as_uri()


def test_file_arrives_whole_and_alone(url: str, tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "target.bin"
    fetch([url], target, MD5)
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]


def test_next_address_is_tried(url: str, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.bin"
    wrong.write_bytes(b"other")
    target = tmp_path / "new" / "target.bin"
    fetch([(tmp_path / "absent").as_uri(), wrong.as_uri(), url], target, MD5)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1], b"", CONTENT + b"x"], ids=["truncated", "empty", "longer"])
def test_wrong_checksum_leaves_nothing(content: bytes, tmp_path: Path) -> None:
    served = tmp_path / "served.bin"
    served.write_bytes(content)
    target = tmp_path / "new" / "target.bin"
    with pytest.raises(OSError, match=rf"^{target} could not be downloaded \(.*md5 is .*, expected {MD5}\)$"):
        fetch([served.as_uri()], target, MD5)
    assert list(target.parent.iterdir()) == []


def test_failure_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "target.bin"
    target.write_bytes(b"old")
    with pytest.raises(OSError, match=r"target.bin could not be downloaded .*absent"):
        fetch([(tmp_path / "absent").as_uri()], target, MD5)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_no_address(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"target.bin could not be downloaded \(no address given\)"):
        fetch([], tmp_path / "target.bin", MD5)


def test_silent_server_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    target = tmp_path / "new" / "target.bin"
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts the connection, never answers
        address = f"http://127.0.0.1:{server.getsockname()[1]}/target.bin"
        with pytest.raises(OSError, match=r"target.bin could not be downloaded .*timed out"):
            fetch([address], target, MD5, timeout=0.1)
    assert not target.parent.exists()


class _Interrupted(io.BytesIO):
    """A response whose second read is cut off by Ctrl-C."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell():
            raise KeyboardInterrupt
        return super().read(size)


def test_interrupt_leaves_nothing(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: _Interrupted(CONTENT))
    target = tmp_path / "new" / "target.bin"
    with pytest.raises(KeyboardInterrupt):
        fetch([url], target, MD5)
    assert list(target.parent.iterdir()) == []
