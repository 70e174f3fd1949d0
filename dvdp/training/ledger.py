"""Metrics on disk: the first place they go, and the one that trackers read.

``metrics.jsonl`` holds one line a log, ``{"images": 6400, "time": 1.7e9, "metrics": {"loss": 0.1}}``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dvdp.files import write_atomically


class Entry(NamedTuple):
    """One log: the images seen, the time (seconds since 1970) and the metrics."""

    images: int
    time: float
    metrics: dict[str, float]


def append(path: Path, images: int, metrics: Mapping[str, float]) -> None:
    """Add a line."""
    entry = {"images": images, "time": time.time(), "metrics": dict(metrics)}
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def read(path: Path) -> list[Entry]:
    """All whole lines, in order; none where there is no file."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    # A line without its end is still being written, or was cut off by a crash.
    return [Entry(**json.loads(line)) for line in lines if line.endswith("\n")]


def truncate(path: Path, images: int) -> None:
    """Drop what was logged after ``images``: the run goes on from there and logs it again."""
    kept = [entry for entry in read(path) if entry.images <= images]
    write_atomically(path, "".join(json.dumps(entry._asdict()) + "\n" for entry in kept))
