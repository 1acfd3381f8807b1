"""The operator `torch.ops.tkn.normed_conv`: batch normalisation in training, ReLU and a 3x3 target convolution in one.

Of bfloat16 maps under autocast, as DenseNets have them. To torch's tools it is one opaque operation, and its gradients
another. There are kernels for it on CPUs that multiply bfloat16 alone: who calls it asks before, `usable`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tkn.backends.cpu import normed
from tkn.ops.eager import may_build
from tkn.ops.reference import reference as target_conv
from tkn.spec import Target, spec_of


def usable() -> bool:
    """Whether there are kernels for it here, compiled now if need be.

    Never in a checkpointed region or a backward pass, where a pass that is computed once more must save the same.
    """
    return may_build() and normed.available(may_build=True)


# As torch.compiler.assume_constant_result marks it, which would import the compiler, for seconds.
usable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def reference(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, target: Target) -> Tensor:
    """What the operator computes, by torch's own operations: [B, C, H, W] -> [B, O, H, W]."""
    normalised = F.batch_norm(x, None, None, norm_weight, norm_bias, training=True, eps=eps)
    return target_conv(F.relu(normalised), (target,))


def _target(weight: Tensor, loc: Tensor, scale: Tensor, attention: str, scale_unit: float) -> Target:
    return Target(spec_of(attention, scale_unit, True, (1, 1), (1, 1, 1, 1), (1, 1), 1), weight, None, loc, scale)


@torch.library.custom_op("tkn::normed_conv", mutates_args=())
def normed_conv(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    loc: Tensor,
    scale: Tensor,
    eps: float,
    attention: str,
    scale_unit: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x bfloat16 [B, C, H, W], the rest float32: the normalisation's weight and bias [C], the convolution's weight
    [O, C, 3, 3], loc and scale [2, O]. Gives y bfloat16 [B, O, H, W], and the batch's mean and biased variance [C].
    EngineUnavailable where there are no kernels."""
    target = _target(weight, loc, scale, attention, scale_unit)
    return normed.forward(x, norm_weight, norm_bias, eps, target)


@torch.library.custom_op("tkn::normed_conv_backward", mutates_args=())
def normed_conv_backward(
    grad: Tensor,
    y: Tensor,
    mean: Tensor,
    variance: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    loc: Tensor,
    scale: Tensor,
    eps: float,
    attention: str,
    scale_unit: float,
) -> list[Tensor]:
    """The gradients of x, norm_weight, norm_bias, weight, loc and scale."""
    target = _target(weight, loc, scale, attention, scale_unit)
    return normed.backward(grad, y, x, (mean, variance), norm_weight, norm_bias, eps, target)


@normed_conv.register_fake
def _(x: Tensor, norm_weight: Tensor, _norm_bias: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])
    return y, torch.empty_like(norm_weight), torch.empty_like(norm_weight)


@normed_conv_backward.register_fake
def _(_grad: Tensor, _y: Tensor, _mean: Tensor, _variance: Tensor, *inputs: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in inputs[:6]]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output, *inputs[:6])
    ctx.options = inputs[6:]


def _backward(ctx: Any, grad: Tensor, _mean: None, _variance: None) -> tuple[Tensor | None, ...]:
    y, mean, variance, *inputs = ctx.saved_tensors
    if torch.is_grad_enabled():  # gradients of these gradients are asked for
        grads = _followed(grad, inputs, ctx.options, ctx.needs_input_grad)
    else:
        grads = torch.ops.tkn.normed_conv_backward(grad, y, mean, variance, *inputs, *ctx.options)
    return *grads, None, None, None


def _followed(grad: Tensor, inputs: list[Tensor], options: Any, needs: Any) -> list[Tensor | None]:
    """The gradients that are needed, with gradients of their own."""
    x, norm_weight, norm_bias, weight, loc, scale = inputs
    eps, attention, scale_unit = options
    wanted = [t for t, needed in zip(inputs, needs, strict=False) if needed]
    with torch.autocast("cpu", torch.bfloat16):
        again = reference(x, norm_weight, norm_bias, eps, _target(weight, loc, scale, attention, scale_unit))
    found = iter(torch.autograd.grad(again, wanted, grad, create_graph=True))
    return [next(found) if needed else None for needed in needs[: len(inputs)]]


normed_conv.register_autograd(_backward, setup_context=_setup)
