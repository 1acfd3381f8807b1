"""An activation times a window: torch's product, and its gradients in any memory format."""

from __future__ import annotations

import pytest
import torch
from engine_cases import assert_near
from torch import Tensor
from torch.autograd import forward_ad

from tkn.backends.torch import weigh as module
from tkn.backends.torch.weigh import weigh


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return made.requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(7,), (5, 6), (1, 1), (3, 4, 2)])
@pytest.mark.parametrize("channels", [1, 4])
def test_equals_torchs_product(dtype: torch.dtype, last: bool, size: tuple[int, ...], channels: int) -> None:
    x, window = random(3, channels, *size, dtype=dtype), random(channels, *size, seed=1, dtype=dtype)
    activation = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    ours = weigh(activation, window)
    assert torch.equal(ours, x * window)
    assert ours.stride() == (activation * window).stride()
    grad = random(*ours.shape, seed=2, dtype=dtype).detach()
    expected = torch.autograd.grad(x * window, (x, window), grad)
    mine = torch.autograd.grad(ours, (x, window), grad)
    assert torch.equal(mine[0], expected[0])
    assert_near(mine[1], expected[1], {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype])


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_gradients_and_theirs(last: bool) -> None:
    x, window = random(2, 3, 2, 3), random(3, 2, 3, seed=1)

    def weighed(x: Tensor, window: Tensor) -> Tensor:
        return weigh(x.contiguous(memory_format=torch.channels_last) if last else x, window)

    assert torch.autograd.gradcheck(weighed, (x, window))
    assert torch.autograd.gradgradcheck(weighed, (x, window))


# torch's own, in its forward mode.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning", "ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_forward_mode_and_gradients_at_once(last: bool) -> None:
    x, window = random(2, 3, 2, 3), random(3, 2, 3, seed=1)
    activation = x.contiguous(memory_format=torch.channels_last) if last else x
    with forward_ad.dual_level():
        y = weigh(activation, forward_ad.make_dual(window, window))
        assert torch.equal(forward_ad.unpack_dual(y).tangent, y)
    y, expected = weigh(activation, window), activation * window
    grads = random(4, *y.shape, seed=2).detach()
    mine = torch.autograd.grad(y, (x, window), grads, is_grads_batched=True)
    theirs = torch.autograd.grad(expected, (x, window), grads, is_grads_batched=True)
    torch.testing.assert_close(mine, theirs)


def test_only_what_gradients_need_is_kept() -> None:
    x, window = random(2, 3, 4, 5), random(3, 4, 5, seed=1)
    of_activation, of_window = weigh(x, window.detach()), weigh(x.detach(), window)
    assert of_activation.grad_fn.saved_tensors[0] is None
    assert of_window.grad_fn.saved_tensors[1] is None


def test_many_images_are_summed_in_more_than_bfloat16() -> None:
    x, window = random(2048, 4, 2, 2).detach().bfloat16(), random(4, 2, 2, seed=1).bfloat16().detach().requires_grad_()
    (grad,) = torch.autograd.grad(weigh(x, window).sum(), window)
    assert_near(grad, x.double().sum(dim=0), 4e-3)


def test_autocast_leaves_gradients_as_they_are() -> None:
    x, window = random(5, 3, 4, 4, dtype=torch.float32), random(3, 4, 4, seed=1, dtype=torch.float32)
    expected = torch.autograd.grad(weigh(x, window).square().sum(), (x, window))
    y = weigh(x, window).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y, (x, window))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(inside, expected, strict=True))


def test_one_image_an_empty_batch_and_what_torch_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    x, window = random(2, 3, 4, 5), random(3, 4, 5, seed=1)
    assert torch.autograd.grad(weigh(x[:0], window).sum(), window)[0].count_nonzero() == 0
    monkeypatch.setattr(module, "_Weigh", None)
    assert torch.equal(weigh(x[0], window), x[0] * window)
    batched = torch.vmap(weigh, in_dims=(0, None))(x.detach(), window.detach())
    assert torch.equal(batched, x * window)
    assert torch.equal(torch.compile(weigh, backend="eager", fullgraph=True)(x, window), x * window)
