"""The share of a run that is no work is what its files and its output say."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.orchestration import Line, Span, covered, measure, run, uncovered
from dvdp.errors import UserError
from tests.e2e.support import Project

SOURCES = Path(__file__).parents[2]


def test_time_in_which_two_work_counts_once() -> None:
    work = [Span(3, 5), Span(1, 4), Span(4.5, 4.6), Span(7, 9)]
    assert covered(work, Span(0, 10)) == pytest.approx(6)
    assert covered(work, Span(2, 8)) == pytest.approx(4)
    assert covered(reversed(work), Span(5, 7)) == 0


def test_every_phase_keeps_what_no_work_covers() -> None:
    parts = uncovered(10, {"start": 13, "middle": 20, "end": 21}, [Span(12, 14), Span(15, 19)])
    assert parts == pytest.approx({"start": 2, "middle": 2, "end": 1})


def written(path: Path, time: float, content: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    os.utime(path, (time, time))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Files of a run of 100 seconds that trains for 40, samples for 10 after a pause of 2, and scores for 1."""
    shutil.copyfile(SOURCES / "params.yaml", tmp_path / "params.yaml")
    written(tmp_path / "data/digits/extractor/extractor.safetensors", 1010)
    written(tmp_path / "data/digits/reference/reference.json", 1016)
    folder = tmp_path / "runs" / "one"
    for name, time in (("run.json", 1026), ("lock", 1030), ("estimate.json", 1032), ("weights.safetensors", 1072)):
        written(folder / name, time)
    written(folder / "samples/hash/00000000.seconds", 1084, "10")
    return tmp_path


LINES = [
    Line(1001, "Running stage 'prepare':"),
    Line(1002, "prepare digits:   0%|    | 0/10"),
    Line(1003, "Running stage 'extractor':"),
    Line(1005, "extractor (labels):   0%|    | 0/10"),
    Line(1011, "Running stage 'reference':"),
    Line(1013, "reference:   0%|    | 0/10"),
    Line(1017, "Running stage 'experiment':"),
    Line(1018, "23:00:48.896 | INFO    | prefect - Starting temporary server on http://127.0.0.1:8760"),
    Line(1022, "23:00:56.232 | INFO    | Flow run 'a' - Beginning flow run 'a' for flow 'experiment'"),
    Line(1072.5, "23:05:12.572 | INFO    | Task run 'train one' - Finished in state Completed()"),
    Line(1084, "23:05:12.572 | INFO    | Task run 'sample one' - Finished in state Completed()"),
    Line(1085, "23:05:12.572 | INFO    | Task run 'score one' - Finished in state Completed()"),
    Line(1086, "23:05:12.572 | INFO    | Task run 'register one' - Finished in state Completed()"),
    Line(1090, "23:05:12.572 | INFO    | Task run 'compare-13e' - Finished in state Completed()"),
    Line(1098, "Updating lock file 'dvc.lock'"),
]


def test_a_run_is_taken_apart_by_what_it_left(project: Path) -> None:
    found = measure(project, Span(1000, 1100), LINES)
    assert found["seconds"] == 100
    assert found["seconds_to_first_step"] == 32
    assert found["jobs_at_a_time"] == 1
    headline = found["orchestration"]
    assert headline["seconds"] == pytest.approx(100 - 40 - 10 - 1 - 5 - 3)
    assert headline["share"] == pytest.approx(0.41)
    assert sum(headline["parts"].values()) == pytest.approx(headline["seconds"])
    assert headline["parts"]["experiment: between jobs"] == pytest.approx(2)
    assert headline["parts"]["experiment: start of Ray Train"] == pytest.approx(4)
    assert found["orchestration_and_preparation"]["seconds"] == pytest.approx(100 - 40 - 10 - 1)


def test_what_is_missing_is_named_in_one_sentence(project: Path) -> None:
    with pytest.raises(UserError, match=r"^dvc repro: found nothing like 'Beginning flow run' in what it showed"):
        measure(project, Span(1000, 1100), [line for line in LINES if "Beginning" not in line.text])
    with pytest.raises(UserError, match=r"where dvc repro ran before, expected a fresh copy; make one\.$"):
        run(project)
    shutil.rmtree(project / "runs")
    with pytest.raises(UserError, match="found no trained run"):
        measure(project, Span(1000, 1100), LINES)


@pytest.mark.slow
def test_a_small_run_is_measured(tmp_path: Path) -> None:
    project = Project.create(tmp_path / "project", training={"images": 800}).folder
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.orchestration", "--project", str(project), "--out", str(out)]
    done = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert 0 < found["seconds_to_first_step"] < found["seconds"]
    assert 0 < found["orchestration"]["seconds"] < found["orchestration_and_preparation"]["seconds"] < found["seconds"]
    assert all(seconds >= 0 for seconds in found["orchestration"]["parts"].values())
