"""Import paths of before a module moved."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest

from tkn.moved import MOVED


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_a_moved_module_is_found_under_its_old_path(old: str, new: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(FutureWarning, match=f"^{old} is {new} now"):
        module = import_module(old)
    assert module is import_module(new)


def test_the_warning_is_of_the_line_that_imports() -> None:
    sys.modules.pop("tkn.engine.fourier", None)
    with pytest.warns(FutureWarning) as caught:
        from tkn.engine.fourier import use_fourier
    assert [warning.filename for warning in caught] == [__file__]
    assert use_fourier.__module__ == MOVED["tkn.engine.fourier"]


def test_other_modules_are_still_not_there() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named .tkn\.engine\.rows."):
        import_module("tkn.engine.rows")
