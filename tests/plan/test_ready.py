"""The kernels of plans are tried in a process of their own, once a machine, before a plan uses them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_cases import assert_near, truth
from plan_networks import NETWORKS, images, network

from tkn import accelerate
from tkn.backends.cpu import build
from tkn.plan import check, ready
from tkn.plan.parts import KernelPart, MapPart, RowPart
from tkn.plan.plan import Plan


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As in a new process on a machine whose kernels were never tried; where it is noted that they were."""
    monkeypatch.setattr(ready, "_trial", ready._Trial())
    monkeypatch.setattr(ready, "folder", lambda _: tmp_path)
    return tmp_path / "plans_checked"


def plan() -> Plan:
    return accelerate(network("plain"), 3, NETWORKS["plain"][1])


def with_kernels(made: Plan) -> bool:
    return any(isinstance(part, KernelPart) for part in made._program.parts)


def test_the_trial_passes() -> None:
    done = subprocess.run([sys.executable, "-m", "tkn.plan.check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_it_is_made_once(untried: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(ready, "run_in_child", tried.append)  # which returns None: all is well
    assert with_kernels(plan())
    assert with_kernels(plan())
    assert tried == ["tkn.plan.check"]
    assert untried.exists()
    monkeypatch.setattr(ready, "_trial", ready._Trial())  # a new process
    assert with_kernels(plan())
    assert len(tried) == 1


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("raise RuntimeError('the kernels compute plans wrongly')", "the kernels compute plans wrongly"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "their check was ended by SIGILL"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "their check was ended by SIGSEGV"),
        ("raise SystemExit(3)", "no word of why"),
    ],
)
def test_kernels_that_fail_cost_one_warning(
    untried: Path,
    program: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    (tmp_path / "failing.py").write_text(program)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = ready.run_in_child
    monkeypatch.setattr(ready, "run_in_child", lambda _: run("failing"))
    x = images("plain", 3)
    for _ in range(2):
        made = plan()
        assert not with_kernels(made)
        assert_near(made(x), truth(network("plain"))(x.double()).detach())
    (warning,) = recwarn
    assert said in str(warning.message)
    assert "torch runs plans" in str(warning.message)
    assert not untried.exists()


def test_a_trial_that_can_not_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "/nowhere/python" in ready.run_in_child("tkn.plan.check")
    monkeypatch.undo()
    monkeypatch.setattr(build, "_PATIENCE", 0.01)
    assert "timed out" in ready.run_in_child("tkn.plan.check")


@pytest.mark.parametrize("kind", [RowPart, MapPart])
def test_wrong_results_are_found(kind: type[KernelPart], monkeypatch: pytest.MonkeyPatch) -> None:
    check.check_plans()
    run = KernelPart.run

    def wrong(self: KernelPart, values: dict[int, torch.Tensor]) -> None:
        run(self, values)
        if isinstance(self, kind):
            for position in self.outputs:
                values[position] = values[position] * 1.01

    monkeypatch.setattr(KernelPart, "run", wrong)
    with pytest.raises(RuntimeError, match="compute plans wrongly"):
        check.check_plans()
