"""Tables as text, Markdown and CSV, and pages from templates."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from dvdp.text import markdown


def magnitude(value: float) -> int:
    """The power of ten of the first digit, once three digits are left."""
    return int(f"{value:.2e}".partition("e")[2])


def si(value: float) -> str:
    """Three digits with the prefix of a power of 1000, e.g. ``41.5 G`` or ``427 k``."""
    power = max(0, min(6, magnitude(value) // 3))
    digits = f"{value / 1000**power:#.3g}".rstrip(".")
    return f"{digits} {' kMGTPE'[power]}".rstrip() if power else f"{value:.3g}"


def as_text(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """The table for a terminal."""
    lines = [list(headings), *map(list, cells)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def as_markdown(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """The table for Markdown."""
    lines = [map(markdown, headings), ["---"] * len(headings), *(map(markdown, line) for line in cells)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_csv(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """The table for spreadsheets."""
    text = io.StringIO()
    csv.writer(text).writerows([headings, *cells])
    return text.getvalue()


def as_page(template: str, **values: Any) -> str:
    """A page that needs no other file."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("pipelines.reports"), autoescape=True)
    return environment.get_template(template).render(**values)
