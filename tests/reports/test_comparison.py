"""The table of a comparison: means over seeds, and a mark on what does not compare."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from dvdp.config import Start, parse_params
from dvdp.evaluation.records import ScoreRecord
from dvdp.evaluation.reference import Anchor
from dvdp.files import write_atomically
from pipelines.jobs.job import Job
from pipelines.jobs.timing import Timing
from pipelines.reports.comparison import Result, best, compare, legend, likelihoods, table

PARAMS: dict[str, Any] = {
    "settings": {"ddpm": {"process": "ddpm"}, "dvdp": {"process": "dvdp", "turning_points": [300]}},
    "seeds": [0, 1],
    "training": {"images": 18_000},
    "sampling": {"steps": 100},
    "evaluation": {"samples": 256},
}
RECORD = ScoreRecord(
    {"fd_labels": 0.0, "fd_labels_error": 0.1, "precision_labels": 0.5},
    "labels", "e", 256, 1797, "d", "none", 32, 100, "torch-fidelity", {"solver": "ddpm", "steps": 250, "seed": 0},
)  # fmt: skip


TIMINGS = {"ddpm": Timing("cpu", 0.3, 0.5), "dvdp": Timing("cpu", 0.15, 0.4)}


def results(
    folder: Path,
    scores: dict[str, tuple[float, float]],
    timings: dict[str, Timing] | None = None,
    **changes: dict[str, Any],
) -> list[Result]:
    """What came of both settings with two seeds each; changes of the record by setting."""
    params = parse_params({**PARAMS, "cluster": {"storage": str(folder)}})
    found = []
    for run in params.runs():
        job = Job(params, run, "digest")
        measured = (TIMINGS if timings is None else timings).get(run.setting)
        if measured:
            text = json.dumps(dataclasses.asdict(measured))
            write_atomically(job.folder / f"timing-{job.sampling_hash}.json", text)
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


def test_a_setting_that_started_from_weights_is_marked_and_told_apart(tmp_path: Path) -> None:
    found = results(tmp_path, {"ddpm": (8.0, 8.0), "dvdp": (3.0, 3.0)})
    found = [r if r.job.run.process == "ddpm" else warm(r) for r in found]
    rows = compare(found)
    assert [line[0] for line in table(rows, "fd_labels")[1]] == ["ddpm", "dvdp ★ ‡"]
    assert (
        "‡ dvdp started from weights that had seen 9,000 images, 5.00e+12 FLOPs before, which no number here counts:"
        " they do not compare at equal training with others." in legend(rows, RECORD)
    )


def warm(result: Result) -> Result:
    """The same from weights that had seen something."""
    run = dataclasses.replace(result.job.run, start=Start("5" * 64, "ddpm", "abc", 9_000, 5e12))
    return dataclasses.replace(result, job=dataclasses.replace(result.job, run=run))


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
    assert "of the fit: ddpm 2.50 (0.25), dvdp 2.50 (0.25). No score" in line
    assert not any(
        "infinitely" in line for line in legend(compare(results(tmp_path, {"ddpm": (1, 1), "dvdp": (1, 1)})), RECORD)
    )


def test_real_images_of_the_same_number_are_named_below_the_table(tmp_path: Path) -> None:
    rows = compare(results(tmp_path, {"ddpm": (4.0, 6.0), "dvdp": (3.0, 3.0)}))
    real = Anchor(256, 1541, 5, {"fd_labels": 1.694}, {"fd_labels": 0.262})
    (line,) = (line for line in legend(rows, RECORD, real) if line.startswith("Real images"))
    assert (
        "score 1.69, with a standard deviation of 0.26 over 5 draws: 256 of them held out, against the other 1,541"
        in line
    )
    (line,) = (line for line in legend(rows, RECORD, dataclasses.replace(real, samples=200)) if "Real" in line)
    assert "200 of them held out, half of the data set and fewer than are scored here" in line


def speedups(folder: Path, dvdp: Timing | None) -> list[str]:
    timings = {"ddpm": TIMINGS["ddpm"]} | ({"dvdp": dvdp} if dvdp else {})
    rows = compare(results(folder, {"ddpm": (4, 4), "dvdp": (3, 3)}, timings))
    headings, cells = table(rows, "fd_labels")
    return [cells[1][headings.index(f"{what} speed-up")] for what in ("training", "sampling")]


def test_speed_ups_are_of_times_that_were_measured_beside_nothing(tmp_path: Path) -> None:
    assert speedups(tmp_path, TIMINGS["dvdp"]) == ["2.00x of 2.11x", "1.25x of 2.11x"]


def test_a_speed_up_above_its_bound_is_never_printed_as_measured(tmp_path: Path) -> None:
    # 7.31 of 1.83 was, once.
    assert speedups(tmp_path, Timing("cpu", 0.3 / 7.31, 0.5 / 7.31)) == ["- of 2.11x", "- of 2.11x"]
    assert speedups(tmp_path, Timing("cpu", 0.3 / 2.15, 0.5 / 2.15)) == ["2.11x of 2.11x", "2.11x of 2.11x"]


@pytest.mark.parametrize("other", [None, Timing("NVIDIA H200", 0.15, 0.4)], ids=str)
def test_what_was_not_measured_or_on_another_device_has_no_speed_up(tmp_path: Path, other: Timing | None) -> None:
    assert speedups(tmp_path, other) == ["- of 2.11x", "- of 2.11x"]


BITS = {"bits_per_dim": 3.5, "bits_per_dim_error": 0.05, "bits_per_dim_images": 256.0, "bits_per_dim_prior": 0.0001}
BITS |= {"bits_per_dim_level_0": 1.25, "bits_per_dim_decoder": 2.2499}


def test_the_likelihood_stands_beside_the_score_where_it_was_bounded(tmp_path: Path) -> None:
    scores = {"ddpm": (4.0, 4.0), "dvdp": (3.0, 3.0)}
    without = compare(results(tmp_path / "without", scores))
    assert "bits / dim ↓" not in table(without, "fd_labels")[0]
    assert likelihoods(without) is None

    lifted = {**BITS, "bits_per_dim": 3.25, "bits_per_dim_level_1": 0.01, "bits_per_dim_lift_1": 0.005}
    found = results(tmp_path / "with", scores, ddpm={"metrics": BITS}, dvdp={"metrics": lifted})
    rows = compare(found)
    headings, cells = table(rows, "fd_labels")
    column = headings.index("bits / dim ↓")
    assert [line[column] for line in cells] == ["3.500 ± 0.098", "3.250 ± 0.098"]
    assert {len(line) for line in cells} == {len(headings)}
    (said,) = (line for line in legend(rows, found[0].record) if line.startswith("bits / dim"))
    assert "of 256 images" in said
    assert likelihoods(rows) == (
        ["setting", "bits / dim ↓", "prior", "level 1", "lift 1", "level 0", "decoder"],
        [
            ["ddpm", "3.500 ± 0.098", "0.0001", "-", "-", "1.2500", "2.2499"],
            ["dvdp", "3.250 ± 0.098", "0.0001", "0.0100", "0.0050", "1.2500", "2.2499"],
        ],
    )
