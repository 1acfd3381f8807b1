"""The processor's name."""

import platform
from pathlib import Path

import pytest

from tkn.app.processor import processor_name


def test_it_is_the_first_of_the_table(tmp_path: Path) -> None:
    table = tmp_path / "cpuinfo"
    table.write_text("processor\t: 0\nmodel name\t: Some CPU: 2 GHz\n\nprocessor\t: 1\nmodel name\t: Another\n")
    assert processor_name(table) == "Some CPU: 2 GHz"


@pytest.mark.parametrize("written", ["CPU part\t: 0xd4f\n", None])
@pytest.mark.parametrize(("processor", "name"), [("arm", "arm"), ("", "arm64")])
def test_without_a_name_it_is_the_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str | None, processor: str, name: str
) -> None:
    table = tmp_path / "cpuinfo"
    if written is not None:
        table.write_text(written)
    monkeypatch.setattr(platform, "processor", lambda: processor)
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert processor_name(table) == name
