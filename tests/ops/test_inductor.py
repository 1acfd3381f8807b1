"""Target layers in programs that torch's inductor compiles: minutes, so not among the default tests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_cases import difference, results, targeted, truth
from torch import nn
from torchvision.models import resnet18

from tkn import build_model, targetize
from tkn.backends.cpu.chain import Chain

# Of torch's own compiler.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tkn6() -> nn.Module:
    torch.manual_seed(0)
    return targeted(build_model("tkn6", (1, 28, 28), 10, engine="roi"), seed=1)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return targeted(targetize(resnet18(num_classes=5), engine="roi"), seed=1)


@pytest.mark.parametrize(("make", "shape"), [(tkn6, (4, 1, 28, 28)), (resnet, (2, 3, 64, 64))])
def test_compiled_forward_and_backward(make: object, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("forward", "backward"):
        method = getattr(Chain, name)
        monkeypatch.setattr(
            Chain, name, lambda self, *args, name=name, method=method: (calls.append(name), method(self, *args))[1]
        )
    network = make().eval()  # type: ignore[operator]
    # Of images 0 inductor rounds a sum before a ReLU to the other side of zero, also with engine="dense".
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    expected, eager = results(truth(network), x.double()), results(network, x)
    calls.clear()
    compiled = torch.compile(network, fullgraph=True)
    for one, other, right in zip(results(compiled, x), eager, expected, strict=True):
        assert difference(one, right) <= 4 * difference(other, right) + 1e-5
    layers = 1 if make is tkn6 else 17  # all of TKN6's in a row are one operation
    assert calls == ["forward"] * layers + ["backward"] * layers


@pytest.mark.parametrize(("make", "shape"), [(tkn6, (1, 28, 28)), (resnet, (3, 64, 64))])
def test_ahead_of_time(make: object, shape: tuple[int, ...], tmp_path: Path) -> None:
    """AOTInductor, loaded and run in a fresh process, for another batch."""
    network = make().eval()  # type: ignore[operator]
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(network, (torch.rand(4, *shape),), dynamic_shapes=({0: batch},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "network.pt2"))
    x = torch.rand(7, *shape)
    with torch.no_grad():
        torch.save((x, network(x)), tmp_path / "expected.pt")
    code = f"""
import json, torch, tkn
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
compiled = torch._inductor.aoti_load_package({package!r})
print(json.dumps(float((compiled(x) - expected).abs().max() / expected.abs().max())))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) < 1e-4


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_compiled_training_of_a_densenet_goes_down_as_eager(kind: torch.dtype) -> None:
    def losses(compiled: bool) -> list[float]:
        torch.manual_seed(0)
        network = targeted(build_model("tdn10", (1, 12, 12), 3, engine="roi"), seed=1).train()
        step = torch.compile(network) if compiled else network
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        x, labels = torch.rand(16, 1, 12, 12), torch.arange(16) % 3
        values = []
        for _ in range(5):
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
                loss = nn.functional.cross_entropy(step(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        return values

    eager, ours = losses(False), losses(True)
    assert difference(torch.tensor(ours), torch.tensor(eager)) < (1e-4 if kind == torch.float32 else 0.02)
    assert ours[-1] < ours[0]
