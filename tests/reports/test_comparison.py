"""The table of a comparison: means over seeds, and a mark on what does not compare."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dvdp.config import parse_params
from dvdp.evaluation.records import ScoreRecord
from dvdp.files import write_atomically
from pipelines.jobs.job import Job
from pipelines.reports.comparison import Result, best, compare, legend, table

PARAMS: dict[str, Any] = {
    "settings": {"ddpm": {"process": "ddpm"}, "dvdp": {"process": "dvdp", "turning_points": [300]}},
    "seeds": [0, 1],
    "evaluation": {"samples": 256},
}
RECORD = ScoreRecord(
    {"fd_labels": 0.0, "fd_labels_error": 0.1, "precision_labels": 0.5},
    "labels", "e", 256, 1797, "d", "none", 32, 100, "torch-fidelity", {"solver": "ddpm", "steps": 250, "seed": 0},
)  # fmt: skip


def results(folder: Path, scores: dict[str, tuple[float, float]], **changes: dict[str, Any]) -> list[Result]:
    """What came of both settings with two seeds each; changes of the record by setting."""
    params = parse_params({**PARAMS, "cluster": {"storage": str(folder)}})
    found = []
    for run in params.runs():
        job = Job(params, run, "digest")
        line = {"images": 100, "time": 1.0, "metrics": {"images_per_second": 50.0}}
        write_atomically(job.folder / "metrics.jsonl", json.dumps(line) + "\n")
        job.samples.mkdir(parents=True, exist_ok=True)
        np.save(job.samples / "00000000.npy", np.zeros((4, 3, 32, 32), np.uint8))
        write_atomically(job.samples / "00000000.seconds", "2.0")
        metrics = {**RECORD.metrics, "fd_labels": scores[run.setting][run.seed]}
        more = dict(changes.get(run.setting, {}))
        record = dataclasses.replace(RECORD, **{"metrics": {**metrics, **more.pop("metrics", {})}, **more})
        found.append(Result(job, record))
    return found


def test_scores_are_means_with_their_interval_over_seeds_and_never_certain_by_chance(tmp_path: Path) -> None:
    rows = compare(results(tmp_path, {"ddpm": (4.0, 6.0), "dvdp": (3.0, 3.0)}))
    headings, cells = table(rows, "fd_labels")
    assert headings[2] == "fd_labels ↓"
    # Two seeds, t = 12.71; two that are equal tell no more than their samples do.
    assert [line[2] for line in cells] == ["5.00 ± 12.71", "3.00 ± 0.14"]
    assert not any("†" in line for line in legend(rows, RECORD))


def test_the_best_leads_only_where_the_interval_of_the_difference_says_so(tmp_path: Path) -> None:
    for name, scores, led in (("far", (8.0, 8.0), True), ("near", (3.1, 3.1), False)):
        rows = compare(results(tmp_path / name, {"ddpm": scores, "dvdp": (3.0, 3.0)}))
        _, cells = table(rows, "fd_labels")
        assert [line[0] for line in cells] == ["ddpm", "dvdp ★" if led else "dvdp"]
        assert best(rows).setting == "dvdp"
        text = " ".join(legend(rows, RECORD))
        assert ("★ marks" in text) == led
        said = "No significant difference between dvdp and ddpm (ddpm is 0.10 higher, 95 % interval -0.10 to 0.30)."
        assert (said in text) != led


def test_a_score_of_a_release_without_intervals_neither_leads_nor_loses(tmp_path: Path) -> None:
    unknown = {"metrics": {"fd_labels_error": math.inf}}
    rows = compare(results(tmp_path, {"ddpm": (8.0, 8.0), "dvdp": (3.0, 3.0)}, dvdp=unknown, ddpm=unknown))
    _, cells = table(rows, "fd_labels")
    assert [line[0] for line in cells] == ["ddpm", "dvdp"]
    assert [line[2] for line in cells] == ["8.00", "3.00"]
    text = " ".join(legend(rows, RECORD))
    assert "has no interval" in text
    assert "No significant difference between dvdp and ddpm (ddpm is 5.00 higher)." in text


@pytest.mark.parametrize(
    "change",
    [
        {"samples": 200},
        {"references": 1000},
        {"reference_digest": "npz 0123"},
        {"extractor_sha256": "other"},
        {"library": "torch-fidelity 9"},
        {"sampling": {"solver": "ddim", "steps": 250}},
        {"sampling": {**RECORD.sampling, "steps": 50}},
    ],
    ids=str,
)
def test_a_score_on_other_terms_is_marked_and_never_the_best(tmp_path: Path, change: dict[str, Any]) -> None:
    found = results(tmp_path, {"ddpm": (4.0, 6.0), "dvdp": (1.0, 1.0)}, dvdp=change)
    rows = compare(found)
    _, cells = table(rows, "fd_labels")
    assert [line[2] for line in cells] == ["5.00 ± 12.71", "1.00 ± 0.14 †"]
    assert best(rows).setting == "ddpm"
    assert any(line.startswith("† ") for line in legend(rows, found[0].record))


def test_the_extrapolation_is_named_below_the_table(tmp_path: Path) -> None:
    ends = {"metrics": {"fd_labels_infinity": 2.5, "fd_labels_infinity_error": 0.25}}
    found = results(tmp_path, {"ddpm": (4.0, 6.0), "dvdp": (3.0, 3.0)}, ddpm=ends, dvdp=ends)
    rows = compare(found)
    assert all(row.same_terms for row in rows)
    (line,) = (line for line in legend(rows, found[0].record) if "infinitely many" in line)
    assert line.endswith("ddpm 2.50 ± 0.25, dvdp 2.50 ± 0.25.")
    assert not any(
        "infinitely" in line for line in legend(compare(results(tmp_path, {"ddpm": (1, 1), "dvdp": (1, 1)})), RECORD)
    )
