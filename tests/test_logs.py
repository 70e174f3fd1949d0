"""Status lines reach terminals and files of any encoding."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

from pipelines.logs import to_file

PROJECT = Path(__file__).parents[1]


def test_a_terminal_without_the_characters_of_a_text_shows_escapes() -> None:
    code = (
        "import logging; from pipelines.logs import to_terminal; to_terminal(); print('★ caf\\udce9');"
        "logging.getLogger('dvdp').info('é')"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT, env=environment
    )
    first, second = done.stdout.splitlines()
    assert first == r"\u2605 caf\udce9"
    assert second.endswith(r" \xe9")
    assert done.stderr == ""


def test_a_file_takes_any_text(tmp_path: Path) -> None:
    with to_file(tmp_path / "log.txt"):
        logging.getLogger("dvdp").info("★ %s", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "log.txt").read_text("utf-8").endswith(" ★ caf\\udce9\n")
