"""Sums, differences, products and quotients, as functions, methods and operators."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

_NAMES: dict[Any, str] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), "add"),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_"), "sub"),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_"), "mul"),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_"), "div"),
    **dict.fromkeys((operator.neg, torch.neg, "neg", "neg_"), "neg"),
}
#: Operators that write over their first operand.
IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


def arithmetic_name(target: Any) -> str | None:
    """Which of them a traced call is of."""
    return _NAMES.get(target) if isinstance(target, Hashable) else None


def as_affine(target: Any, number: Tensor | None, place: int) -> tuple[Tensor, Tensor] | None:
    """The scale and shift of x in a call of x and of a `number`; `place`: which of its arguments x is."""
    name = arithmetic_name(target)
    if number is None:
        one = torch.ones((), dtype=torch.float64, device="cpu")
        return (-one, 0 * one) if name == "neg" else None
    one, zero = torch.ones_like(number), torch.zeros_like(number)
    if name == "add":
        return one, number
    if name == "sub":
        return (one, -number) if place == 0 else (-one, number)
    if name == "mul":
        return number, zero
    return (1 / number, zero) if name == "div" and place == 0 else None
