"""Markdown pages in which what stands between two comments is made, and the rest written by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable


def fill_blocks(text: str, kinds: Iterable[str], make: Callable[[str, str], str]) -> str:
    """The text with make(kind, name) between each `<!-- kind name -->` and the `<!-- end -->` that follows.

    ValueError for a block that has no end before the next begins.
    """
    blocks = re.compile(rf"(<!-- ({'|'.join(kinds)}) (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

    def block(match: re.Match[str]) -> str:
        begin, kind, name, before, end = match.groups()
        if "<!--" in before:
            raise ValueError(f"{begin.strip()} has no end before the next")
        return f"{begin}\n{make(kind, name)}\n{end}"

    return blocks.sub(block, text)
