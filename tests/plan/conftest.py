"""Every test here finds the kernels compiled."""

from kernels_there import _compiled, fresh_check

__all__ = ["_compiled", "fresh_check"]
