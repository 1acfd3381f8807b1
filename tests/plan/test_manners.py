"""A plan among torch's other things: default devices, lazy tensors, modes, tracers, modules, threads."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import assert_near, targeted
from plan_networks import NETWORKS, images, network, plan_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tkn import TargetConv2d, accelerate, load_plan
from tkn.plan import place
from tkn.plan.parts import Program
from tkn.plan.plan import Plan

#: By the engine alone, and with torch between.
NAMES = ("plain", "unknown layers", "concatenating")


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def meta_device() -> Iterator[Callable[[], None]]:
    """Makes it the default device, until the test ends."""
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


@pytest.mark.parametrize("small", [False, True], ids=["rows", "maps"])
@pytest.mark.compact
def test_default_devices(name: str, small: bool, meta_device: Callable[[], None], tmp_path: Path) -> None:
    """A plan and all that it needs lies on the CPU, wherever else tensors are made by default."""
    size = NETWORKS[name][1]
    model, x, other = network(name), images(name, 3), images(name, 20)
    plan = plan_of(model, size, 3, small=small)
    expected, expected_other = plan(x), plan(other)
    meta_device()
    for batch, result in ((x, expected), (other, expected_other)):
        assert torch.equal(plan(batch), result)
    assert_near(accelerate(model, 3, size)(x), expected)
    assert_near(accelerate(model, 3)(x), expected)
    plan.save(tmp_path / "net.plan")
    for again in (load_plan(tmp_path / "net.plan"), copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert_near(again(x), expected)
    torch.set_default_device(None)
    with torch.device("meta"):
        assert torch.equal(plan_of(model, size, 3, small=small)(x), expected)


@pytest.mark.compact
def test_lazily_negated_images(name: str) -> None:
    y = images(name, 4)
    x = torch.complex(0 * y, y).conj().imag
    assert x.is_neg()
    plan = accelerate(network(name), 4, NETWORKS[name][1])
    assert torch.equal(plan(x), plan(-y))


class Negated(nn.Module):
    """Hands a negated view to a part of the plan."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = TargetConv2d(2, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.complex(x, x).conj().imag)


def test_lazily_negated_activations() -> None:
    torch.manual_seed(0)
    model = targeted(Negated(), seed=1).eval()
    x = torch.rand(3, 2, 7, 7)
    with torch.no_grad():
        assert_near(accelerate(model, 3, (2, 7, 7))(x), model(x))


def test_layouts_of_activations() -> None:
    """A part may be handed any layout by torch."""
    torch.manual_seed(0)

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = TargetConv2d(2, 8, 3, padding=1), TargetConv2d(8, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).transpose(2, 3).to(memory_format=torch.channels_last)
            return self.second(x.expand(-1, -1, -1, -1)[:, :, ::2])

    model = targeted(Turned(), seed=1).eval()
    for batch in (1, 20):
        x = torch.rand(batch, 2, 7, 8)
        with torch.no_grad():
            assert_near(accelerate(model, batch, (2, 7, 8))(x), model(x))


def test_inference_mode(name: str) -> None:
    """Made or called there, a plan computes the same there and elsewhere."""
    size, x = NETWORKS[name][1], images(name, 20)
    plan = accelerate(network(name), 20, size)
    expected = plan(x)
    with torch.inference_mode():
        made_there, lazily = accelerate(network(name), 20, size), accelerate(network(name), 20)
        inside = images(name, 20)
        for each in (plan, made_there, lazily):
            assert_near(each(inside), expected)
    for each in (made_there, lazily):
        assert_near(each(x), expected)
        assert_near(each(inside), expected)
        assert not each(x).is_inference()


@pytest.mark.parametrize("bad", [[[1.0]], "images", None])
def test_what_is_no_tensor(bad: object) -> None:
    with pytest.raises(ValueError, match=f"the plan takes a tensor, not a {type(bad).__name__}"):
        accelerate(network("plain"), 2, (2, 9, 9))(bad)


def test_sparse_images() -> None:
    with pytest.raises(ValueError, match=r"float32 on the CPU, not .*sparse_coo"):
        accelerate(network("plain"), 2, (2, 9, 9))(images("plain", 2).to_sparse())


# Tracers and modes that must see torch's own operations.


@pytest.mark.filterwarnings("ignore")  # torch's, of its older tracer
def test_transforms_and_tracers(name: str) -> None:
    plan, x = accelerate(network(name), 3, NETWORKS[name][1]), images(name, 3)
    assert_near(torch.func.vmap(plan)(x[:, None]), torch.stack([plan(image) for image in x[:, None]]))
    assert_near(torch.jit.trace(plan, (x,), check_trace=False)(x), plan(x))


@pytest.mark.slow
def test_compiling(name: str) -> None:
    plan, x = accelerate(network(name), 3, NETWORKS[name][1]), images(name, 3)
    for module in (plan, nn.Sequential(plan, nn.ReLU())):
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        assert_near(compiled(x), module(x))


@pytest.mark.slow
def test_exporting(name: str) -> None:
    plan, x = accelerate(network(name), 3, NETWORKS[name][1]), images(name, 3)
    exported = torch.export.export(nn.Sequential(plan), (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    for batch in (3, 20):
        assert_near(exported.module()(images(name, batch)), plan(images(name, batch)))


def test_counters_count() -> None:
    plan = accelerate(network("plain"), 3, (2, 9, 9))
    with FlopCounterMode(display=False) as counter:
        result = plan(images("plain", 3))
    assert counter.get_total_flops() > 0
    assert_near(result, plan(images("plain", 3)))


# A plan as a module.


@pytest.fixture(scope="module")
def plan() -> Plan:
    return accelerate(network("plain"), 2, (2, 9, 9))


def test_a_plan_is_a_module_without_parameters(plan: Plan) -> None:
    assert isinstance(plan, nn.Module)
    assert not list(plan.parameters())
    assert not list(plan.buffers())
    assert list(plan.modules()) == [plan]
    assert not plan.training
    assert repr(plan) == "Plan(batch_size=2, input_size=(2, 9, 9), float32 on the CPU)"
    assert plan.eval() is plan
    assert plan.train(False) is plan
    assert not list(accelerate(network("plain"), 2).modules())[1:]  # whose model is kept for its first call


def test_a_plan_in_a_sequence(plan: Plan) -> None:
    sequence = nn.Sequential(plan, nn.Softmax(dim=1)).eval()
    x = images("plain", 2)
    assert torch.equal(sequence(x), plan(x).softmax(1))
    seen: list[tuple[int, ...]] = []
    handle = plan.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape)))
    sequence(x)
    handle.remove()
    assert seen == [(2, 5)]


@pytest.mark.parametrize("inside", [False, True], ids=["plan", "sequence"])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda m: m.state_dict(), r"plan\.save\(path\)"),
        (lambda m: m.load_state_dict({}), r"load them into the network and make its plan with tkn\.accelerate"),
        (lambda m: m.train(), "train the network, then make its plan"),
        *(
            (change, "make another with tkn.accelerate")
            for change in (
                *(lambda m: m.to("cpu"), lambda m: m.to(torch.float64), lambda m: m.half(), lambda m: m.bfloat16()),
                *(lambda m: m.double(), lambda m: m.cuda(), lambda m: m.cpu(), lambda m: m.to_empty(device="meta")),
                lambda m: m._apply(lambda t: t),
            )
        ),
    ],
)
def test_what_a_plan_refuses(plan: Plan, what: Callable[[nn.Module], object], message: str, inside: bool) -> None:
    module = nn.Sequential(plan, nn.ReLU()) if inside else plan
    expected = plan(images("plain", 2))
    with pytest.raises(RuntimeError, match=message):
        what(module)
    assert not plan.training
    assert torch.equal(plan(images("plain", 2)), expected)


# Threads.


def together(count: int, work: Callable[[int], None]) -> None:
    """`work(n)` in `count` threads that begin at the same moment; the first error of any of them."""
    start, errors = threading.Barrier(count), []

    def run(number: int) -> None:
        try:
            start.wait(timeout=60)
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("small", [False, True], ids=["rows", "maps"])
@pytest.mark.compact
def test_eight_threads_with_changing_batch_sizes(name: str, small: bool) -> None:
    plan = plan_of(network(name), NETWORKS[name][1], 16 if small else 40, small=small)
    batches = (1, 5, 16, 17, 40)
    inputs = [images(name, batch) for batch in batches]
    expected = [plan(x) for x in inputs]

    def work(number: int) -> None:
        for call in range(30):
            chosen = (number + call) % len(batches)
            assert torch.equal(plan(inputs[chosen]), expected[chosen])

    together(8, work)


def test_calls_do_not_wait_for_each_other() -> None:
    """Two calls meet within the plan."""
    meeting = threading.Barrier(2)
    torch.manual_seed(0)

    class Meeting(nn.Module):
        waits = False

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() == 0 and Meeting.waits:  # which can't be traced
                meeting.wait(timeout=60)
            return x

    model = nn.Sequential(nn.Conv2d(1, 2, 3), Meeting(), nn.Conv2d(2, 2, 1))
    with torch.no_grad():
        model[0].bias.zero_()
    plan = accelerate(model, 1, (1, 5, 5))
    Meeting.waits = True

    def work(_: int) -> None:
        plan(torch.zeros(1, 1, 5, 5))

    together(2, work)


def test_threads_make_a_plan_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    arranged = place.ARRANGED["cpu"]

    def counting(*arguments: Any) -> Program:
        made.append(threading.get_ident())
        return arranged(*arguments)

    monkeypatch.setitem(place.ARRANGED, "cpu", counting)
    plan = accelerate(network("plain"), 2)
    x = images("plain", 2)
    results: list[Tensor] = []
    together(8, lambda _: results.append(plan(x)))
    assert len(made) == 1
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_plan_is_called_while_another_thread_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracer of torch.fx puts a call of its own in the place of every module's."""
    plan, x = accelerate(network("plain"), 2, NETWORKS["plain"][1]), images("plain", 2)
    expected = plan(x)
    monkeypatch.setattr(nn.Module, "__call__", lambda *_: pytest.fail("traced"))
    assert torch.equal(plan(x), expected)


def test_a_first_call_that_fails_leaves_the_next_one_to_try() -> None:
    plan = accelerate(network("plain"), 2)
    with pytest.raises(RuntimeError, match="channels"):
        plan(torch.rand(2, 3, 9, 9))
    assert plan(images("plain", 2)).shape == (2, 5)
