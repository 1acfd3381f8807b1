"""Downloads of data files: short time-outs, checksums, and never half a file."""

from __future__ import annotations

import hashlib
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

from tkn.app.files import whole_file

CHUNK_BYTES = 1 << 18


def fetch(url_candidates: Sequence[str], path: Path, md5: str, timeout: float = 5.0) -> None:
    """Download one file to `path`, from the first address that serves the bytes with this `md5` (hex).

    `timeout`: seconds allowed for connecting and for each read, not for the whole file. The file appears whole or
    not at all, also when interrupted; missing parent folders are made. OSError, in one line, when no address works.
    """
    reason = "no address given"
    for url in url_candidates:
        digest = hashlib.md5(usedforsecurity=False)
        try:
            with urllib.request.urlopen(url, timeout=timeout) as response:
                path.parent.mkdir(parents=True, exist_ok=True)
                with whole_file(path) as partial:
                    with partial.open("wb") as file:
                        while chunk := response.read(CHUNK_BYTES):
                            digest.update(chunk)
                            file.write(chunk)
                    if digest.hexdigest() != md5:
                        raise OSError(f"md5 is {digest.hexdigest()}, expected {md5}")
            return
        except (OSError, HTTPException) as error:
            reason = f"{url}: {error or type(error).__name__}"
    raise OSError(f"{path} could not be downloaded ({reason})")
