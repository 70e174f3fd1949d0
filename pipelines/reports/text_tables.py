"""Tables as text, Markdown and CSV, and pages from templates."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape


def as_text(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """The table for a terminal."""
    lines = [list(headings), *map(list, cells)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def as_markdown(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """The table for Markdown."""
    lines = [list(headings), ["---"] * len(headings), *map(list, cells)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_csv(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """The table for spreadsheets."""
    text = io.StringIO()
    csv.writer(text).writerows([headings, *cells])
    return text.getvalue()


def as_page(template: str, **values: Any) -> str:
    """A page that needs no other file."""
    environment = Environment(loader=PackageLoader("pipelines.reports"), autoescape=select_autoescape())
    return environment.get_template(template).render(**values)
