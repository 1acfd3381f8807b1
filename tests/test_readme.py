"""The README's and the guides' own commands and Python: what they show works, and the README stays short."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tkn import count_macs, load_plan
from tkn.bench import config as bench_config
from tkn.bench.cli import TKN_BENCH
from tkn.export.cli import _parser as export_parser
from tkn.predict.cli import _parser as predict_parser
from tkn.report.cli import _parser as report_parser
from tkn.training.compose import TKN_RUN
from tkn.training.config import check_config

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
#: Pages whose commands are for everybody: no extra, cluster or file of one's own.
GUIDES = [README, *(ROOT / "docs" / f"{name}.md" for name in ("command", "recipes", "report"))]
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
BATCH = 2


def blocks(language: str, page: Path) -> list[str]:
    """The page's blocks of a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> Iterator[list[str]]:
    """The words of each command of the guides; without comments, and without what is left to the reader ("...")."""
    for page in GUIDES:
        for line in "".join(blocks("sh", page)).splitlines():
            for part in line.split(" && "):
                words = shlex.split(part, comments=True)
                yield [word for word in words if word != "..."]


COMMANDS = list(commands())


def checked_run(arguments: list[str]) -> None:
    """tkn-run and tkn-bench check their arguments, sweeps too, before they make a folder."""
    TKN_RUN._check_overrides(arguments, lambda: check_config)


def checked_bench(arguments: list[str]) -> None:
    TKN_BENCH._check_overrides(arguments, lambda: bench_config.check_config)


def checked_report(arguments: list[str]) -> None:
    report_parser().parse_args(arguments)


def checked_export(arguments: list[str]) -> None:
    export_parser().parse_args(arguments)


def checked_predict(arguments: list[str]) -> None:
    predict_parser().parse_args(arguments)


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "tkn-run": checked_run,
    "tkn-bench": checked_bench,
    "tkn-report": checked_report,
    "tkn-export": checked_export,
    "tkn-predict": checked_predict,
}


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] in CHECKS], ids=" ".join)
def test_commands(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    CHECKS[words[0]](words[1:])


def test_all_commands_are_known() -> None:
    assert {words[0] for words in COMMANDS} <= {*CHECKS, "pip", "python", "cd"}
    modules = {words[2] for words in COMMANDS if words[:2] == ["python", "-m"]}
    assert modules
    for module in modules:
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), target


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("pixels", "share"), [(64, 0.7), (224, 0.3)])
def test_your_own_cnn(
    pixels: int, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The section's block; of small images a ResNet's last maps are ROIs of the smallest side already."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    labels = torch.tensor([3, 999])
    (text,) = blocks("python", README)
    for written, here in [
        ("(3, 224, 224)", f"(3, {pixels}, {pixels})"),
        ("batch_size=128", f"batch_size={BATCH}"),
        ("share=0.3", f"share={share}"),
    ]:
        assert written in text
        text = text.replace(written, here)
    variables: dict[str, Any] = {"batches": [(torch.randn(BATCH, 3, pixels, pixels), labels) for _ in range(4)]}
    exec(compile(text, str(README), "exec"), variables)

    model = variables["model"]
    report = count_macs(model, (3, pixels, pixels))
    assert 0.98 * share < report.total_roi / report.total_dense <= share
    assert f"{report.total_dense:,}" in capsys.readouterr().out
    expected = model.eval()(variables["images"])
    torch.testing.assert_close(variables["scores"], expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(load_plan("model.plan")(variables["images"]), variables["scores"])
