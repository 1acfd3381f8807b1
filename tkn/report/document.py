"""The report as Markdown and as one HTML page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from tkn.report.figures.style import Picture, slug
from tkn.report.tables.formats import markdown_table
from tkn.report.tables.sheets import Sheet

TITLE = "Targeted Kernel Networks: report"
_TYPES = {".png": "image/png", ".gif": "image/gif"}


@dataclass(frozen=True)
class Document:
    """What a report shows: sentences, tables, figures, what could not be shown, and other pages (title, address)."""

    lead: Sequence[str]
    sheets: Sequence[Sheet]
    pictures: Sequence[Picture]
    notes: Sequence[str]
    title: str = TITLE
    links: Sequence[tuple[str, str]] = ()


def markdown(document: Document, folder: Path) -> str:
    """`folder`: the report's, to which the figures' links are relative."""
    parts = [f"# {document.title}\n", *(f"{sentence}\n" for sentence in document.lead)]
    if document.links:
        parts.append("\n".join(f"- [{title}]({address})" for title, address in document.links) + "\n")
    parts += [markdown_table(sheet) for sheet in document.sheets]
    if document.notes:
        parts.append("\n".join(["## Notes", "", *(f"- {note}" for note in document.notes)]) + "\n")
    for picture in document.pictures:
        link = picture.path.relative_to(folder).as_posix()
        others = "".join(
            f" ([{path.suffix[1:].upper()}]({path.relative_to(folder).as_posix()}))" for path in picture.others
        )
        parts.append(f"## {picture.title}\n\n![{picture.alt}]({link})\n\n{picture.caption}{others}\n")
    return "\n".join(parts)


def html(document: Document) -> str:
    """Style and pictures are in the page itself."""
    environment = Environment(
        loader=PackageLoader("tkn.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["slug"] = slug
    environment.filters["data_uri"] = _data_uri
    return environment.get_template("report.html.jinja").render(document=document)


def _data_uri(path: Path) -> str:
    return f"data:{_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
