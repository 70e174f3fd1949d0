"""Whatever a text holds, in a table or on a page it is text and no markup."""

from __future__ import annotations

import csv
import html
import io
import os
import re

from pipelines.reports.text_tables import as_csv, as_markdown, as_page, markdown

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


def test_a_page_escapes_all_that_it_is_given() -> None:
    odd = '<b title="x">&\'</b>'
    values = {
        "title": odd,
        "subtitle": odd,
        "headings": [odd],
        "cells": [[odd]],
        "legend": [odd],
        "failures": {odd: odd},
    }
    pictures = {name: [("data:,", odd)] for name in ("curves", "sweeps", "grids", "processes")}
    page = as_page(
        "report.html", **values, **pictures, contact_sheet=odd, anchors=([odd], [[odd]]), provenance={odd: odd}
    )
    assert "<b " not in page
    assert html.unescape(page).count(odd) == 21
    section = {"title": odd, "headings": [odd], "cells": [[odd]], "notes": [odd]}
    page = as_page("tables.html", title=odd, sections=[section], legend=[odd], pictures=[("data:,", odd)])
    assert "<b " not in page


def test_a_csv_file_gives_back_its_cells() -> None:
    rows = [[text, "1,2"] for text in ODD if text.isprintable()]
    assert [*csv.reader(io.StringIO(as_csv(["a", "b"], rows)))] == [["a", "b"], *rows]
