"""What a report is made of, and how it becomes Markdown or one HTML page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

PICTURES = "report"
"""The folder of the pictures, beside the Markdown."""


@dataclass(frozen=True)
class Table:
    """A table; `best` are the cells (row, column) to emphasise, `long` one of running text."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    best: frozenset[tuple[int, int]] = frozenset()
    long: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture with the name of its file and what it shows."""

    name: str
    alt: str
    png: bytes = field(repr=False)

    @property
    def data_uri(self) -> str:
        """Return the picture as part of a page."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Section:
    """A heading, what is said about it, and tables or pictures."""

    title: str
    notes: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()


def to_markdown(title: str, parts: Sequence[Section]) -> str:
    """Return a report as Markdown; pictures are linked."""
    lines = [f"# {title}"]
    for part in parts:
        lines += [f"## {part.title}", *part.notes]
        lines += [_markdown_table(table) for table in part.tables]
        lines += [f"![{p.alt}]({PICTURES}/{p.name})" for p in part.pictures]
    return "\n\n".join(lines) + "\n"


def _markdown_table(table: Table) -> str:
    def cells(row: int, texts: Sequence[str]) -> str:
        plain = [t.replace("|", "\\|").replace("\n", "<br>") for t in texts]
        marked = [f"**{t}**" if (row, i) in table.best else t for i, t in enumerate(plain)]
        return "| " + " | ".join(marked) + " |"

    align = ("---" if i == 0 or table.long else "---:" for i in range(len(table.header)))
    body = [cells(row, texts) for row, texts in enumerate(table.rows)]
    return "\n".join([cells(-1, table.header), "| " + " | ".join(align) + " |", *body])


def to_html(title: str, parts: Sequence[Section]) -> str:
    """Return a report as one page that needs no other file."""
    from jinja2 import Environment

    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(title=title, sections=parts)
