"""Status lines reach terminals and files of any encoding, and a server as many as it bears."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import logs
from pipelines.jobs import failures
from pipelines.jobs.train import following
from pipelines.logs import BURST, SECONDS_A_LINE, Sparse, to_file
from tests.logs import hearing

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


def test_a_server_gets_a_burst_of_lines_and_then_few_of_each_task() -> None:
    sparse = Sparse()
    hours = 10
    taken = [sparse.take("long", float(second)) for second in range(3600 * hours)]
    assert taken[:BURST] == [0] * BURST
    sent = [skipped for skipped in taken if skipped is not None]
    assert abs(len(sent) - BURST - 3600 * hours / SECONDS_A_LINE) <= 1
    last = max(i for i, skipped in enumerate(taken) if skipped is not None)
    assert sum(sent) + len(sent) == last + 1, "each line left out is counted once"
    assert sparse.take("another", 3600.0 * hours) == 0


def test_lines_that_workers_add_to_a_file_are_logged_whole_and_once(tmp_path: Path) -> None:
    path, lines = tmp_path / "log.txt", list[str]()
    path.write_text("09:00:00 of an earlier attempt\n")
    with hearing(lines.append), following(path), path.open("ab", buffering=0) as file:
        for part in ("10:00:00 ddpm: 3", "20 / 4800 images ★\n10:00:01 10:30:00 done\n", "10:00:02 no end"):
            file.write(part.encode())
            time.sleep(0.7)
    assert lines == ["ddpm: 320 / 4800 images ★", "10:30:00 done"]


def test_what_a_run_logs_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (logs, failures):
        monkeypatch.setattr(module, "MOST_BYTES", 1000)
    with to_file(tmp_path / "log.txt"):
        for number in range(200):
            logging.getLogger("dvdp").info("line %s", number)
    for _ in range(50):
        failures.keep("error " * 20, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "log.txt.1", "errors.txt", "errors.txt.1"}
    assert all(path.stat().st_size < 1200 for path in tmp_path.iterdir())
    assert (tmp_path / "log.txt").read_text().endswith("line 199\n")


def test_who_follows_a_file_sees_that_it_was_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MOST_BYTES", 1000)
    lines: list[str] = []
    with hearing(lines.append), following(tmp_path / "log.txt"):
        (tmp_path / "log.txt").write_text("first line\n" * 80)
        time.sleep(1)
        (tmp_path / "log.txt").write_text("second line\n" * 2)
    assert lines == ["first line"] * 80 + ["second line"] * 2
