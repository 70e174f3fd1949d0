"""What runs took beside what was said before their first step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dvdp.training import ledger
from pipelines.reports.comparison import Result


def costs(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: of every run minutes of training, GiB of a worker and GiB on disk, estimated and measured."""
    headings = ["run", "training min, estimated", "measured", "GiB, estimated", "measured", "disk GiB, estimated"]
    return [*headings, "measured"], [_cells(result) for result in results]


def _cells(result: Result) -> list[str]:
    folder = result.job.folder
    path = folder / "estimate.json"
    said = json.loads(path.read_text()) if path.is_file() else {}
    entries = ledger.read(folder / "metrics.jsonl")
    before = [0, *(entry.images for entry in entries)]
    seconds = sum(
        (entry.images - seen) / entry.metrics["images_per_second"] for seen, entry in zip(before, entries, strict=False)
    )
    memory = max((entry.metrics.get("memory_gib", 0.0) for entry in entries), default=0.0)
    disk = sum(_bytes(place) for place in (folder / "checkpoints", result.job.weights, result.job.samples))

    def shown(value: float | None, unit: float, digits: int) -> str:
        return f"{value / unit:.{digits}f}" if value else "-"

    return [
        result.job.name,
        shown(said.get("seconds"), 60, 1),
        shown(seconds, 60, 1),
        shown(said.get("memory_bytes"), 2**30, 2),
        shown(memory, 1, 2),
        shown(said.get("disk_bytes"), 2**30, 3),
        shown(disk, 2**30, 3),
    ]


def _bytes(place: Path) -> int:
    files = place.glob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())
