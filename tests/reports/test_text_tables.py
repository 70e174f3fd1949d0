"""Whatever a text holds, in a table or on a page it is text and no markup."""

from __future__ import annotations

import csv
import html
import io
import os
import re

import pytest
from markdown_it import MarkdownIt

from pipelines.reports.origin import Link
from pipelines.reports.text_tables import as_csv, as_markdown, as_page, markdown, si

ODD = ["a|b", "<script>alert('1')</script>", "*x* `y` [z](w) _u_", "a\nb", os.fsdecode(b"caf\xe9"), "&lt;", "a\\|b"]


def test_a_markdown_table_has_as_many_cells_as_columns() -> None:
    lines = as_markdown(["name", "value"], [[text, "1"] for text in ODD]).splitlines()
    assert len(lines) == 2 + len(ODD)
    assert all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3 for line in lines)
    assert "<" not in "".join(lines)
    assert lines[2] == r"| a\|b | 1 |"
    assert lines[4] == r"| \*x\* \`y\` \[z\](w) \_u\_ | 1 |"
    assert lines[5] == r"| a\\u000ab | 1 |"
    "".join(lines).encode()


def test_plain_text_stays_as_it_is_in_markdown() -> None:
    plain = "fd_labels ↓, 5.00 ± 1.41 † (settings a_b, 1.18x of 1.00x) ★"
    assert markdown(plain) == plain


@pytest.mark.parametrize("text", ["# a", "- a", "+ a", "1. a", "12) a", "  ## a", "> a"])
def test_a_line_begins_no_heading_list_or_quotation(text: str) -> None:
    (opening, inline, _) = MarkdownIt().parse(markdown(text))
    assert opening.type == "paragraph_open"
    assert "".join(token.content for token in inline.children or ()) == text.strip()


def test_a_page_escapes_all_that_it_is_given() -> None:
    odd = '<b title="x">&\'</b>'
    texts = dict.fromkeys(("title", "subtitle", "contact_sheet", "smoothing"), odd)
    lists = {name: [odd] for name in ("result", "cells", "legend", "spent")}
    pairs = {name: [("data:,", odd)] for name in ("sweeps", "grids", "processes")}
    tables = {name: ([odd], [[odd]]) for name in ("costs", "anchors", "runs")}
    more = {"headings": [odd], "cells": [[odd]], "failures": {odd: odd}, "facts": {odd: Link(odd, f"https://{odd}")}}
    page = as_page(
        "report.html", **{**texts, **lists, **pairs, **tables, **more}, commands=[(odd, odd)], curves=["data:,"] * 4
    )
    assert "<b " not in page
    assert html.unescape(page).count(odd) == 33
    section = {"title": odd, "headings": [odd], "filled": [[odd]], "empty": [[odd]], "notes": [odd]}
    page = as_page(
        "tables.html",
        title=odd,
        sections=[section],
        legend=[odd, odd],
        pictures=[("data:,", odd)],
        own=([odd], [[odd]]),
    )
    assert "<b " not in page
    assert html.unescape(page).count(odd) == 17


def test_a_cell_leads_to_servers_alone() -> None:
    links = [["a", Link("here", "javascript:alert(1)"), Link("there", "http://127.0.0.1:5000/#/")]]
    page = as_page("tables.html", legend=["", ""], own=(["a", "b", "c"], links))
    assert "javascript" not in page
    assert '<a href="http://127.0.0.1:5000/#/">there</a>' in page


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5"), (999.9, "1.00 k"), (427_123, "427 k"), (1e6, "1.00 M"), (41.5e9, "41.5 G"), (1.2345e15, "1.23 P")],
)
def test_large_numbers_have_three_digits_and_a_prefix(value: float, text: str) -> None:
    assert si(value) == text


def test_a_csv_file_gives_back_its_cells() -> None:
    rows = [[text, "1,2"] for text in ODD if text.isprintable()]
    assert [*csv.reader(io.StringIO(as_csv(["a", "b"], rows)))] == [["a", "b"], *rows]
