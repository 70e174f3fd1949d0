"""Pictures of scores over turning points, from settings that were trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dvdp.config import ProcessName, Run, parse_params
from dvdp.evaluation.records import ScoreRecord
from pipelines.reports.sweeps import draw_sweeps, known_settings
from pipelines.tracking.history import Trained
from tests.reports.study import study


def a_run() -> Run:
    return parse_params({"settings": {"ddpm": {"process": "ddpm"}}}).runs()[0]


def trained(kind: ProcessName, points: tuple[int, ...], *scores: float) -> Trained:
    record = ScoreRecord({"fd_labels": scores[0]}, "labels", "0" * 64, 256, 1000, "1" * 64, "none", 32, 100, "library")
    return Trained(kind, points, scores, record)


def names(drawn: list[tuple[Path, str]]) -> list[str]:
    for path, _ in drawn:
        Image.open(path).verify()
    return [path.name for path, _ in drawn]


DDPM = trained("ddpm", (), 4.1, 3.9, 4.0)


def test_both_processes_over_the_first_turning_point(tmp_path: Path) -> None:
    settings = [DDPM]
    for T, one, other in ((50, 4.4, 12.0), (200, 4.0, 6.0), (600, 3.8, 3.9)):
        settings += [trained("dvdp", (T,), one, one + 0.3), trained("subspace", (T,), other, other + 0.2)]
    assert names(draw_sweeps(tmp_path, settings, a_run())) == ["first_turning_point.png"]


def test_scores_and_speed_ups_over_the_number_of_turning_points(tmp_path: Path) -> None:
    settings = [DDPM, trained("dvdp", (600,), 3.9, 4.0), trained("dvdp", (300, 600), 3.2)]
    assert names(draw_sweeps(tmp_path, settings, a_run())) == ["turning_points.png"]


def test_nothing_is_drawn_of_settings_that_show_no_course(tmp_path: Path) -> None:
    assert draw_sweeps(tmp_path, [], a_run()) == []
    assert draw_sweeps(tmp_path, [DDPM, trained("dvdp", (600,), 3.9)], a_run()) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("of_dvdp", "drawn"), [("noise", "data"), ("data", "data")])
def test_subspace_diffusion_is_drawn_with_the_lift_of_its_paper_beside_dvdp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_dvdp: str, drawn: str
) -> None:
    monkeypatch.chdir(tmp_path)
    one = {"process": "subspace", "turning_points": [600]}
    settings = {
        "dvdp": {"process": "dvdp", "turning_points": [600]},
        "subspace-noise": {**one, "overrides": {"sampling": {"lift": "noise"}}},
        "subspace-data": {**one, "overrides": {"sampling": {"lift": "data"}}},
        "subspace-early": {"process": "subspace", "turning_points": [300], "overrides": {"sampling": {"lift": "data"}}},
    }
    results = study(
        tmp_path,
        settings=settings,
        sampling={"count": 16, "lift": of_dvdp},
        evaluation={"samples": 16, "kid_subset": 8},
    )
    found = {(s.process, s.turning_points): s for s in known_settings(results)}
    assert list(found) == [("dvdp", (600,)), ("subspace", (300,)), ("subspace", (600,))]
    assert {len(setting.scores) for setting in found.values()} == {2}, "one a seed"
    assert found["dvdp", (600,)].record.sampling["lift"] == of_dvdp
    assert found["subspace", (600,)].record.sampling["lift"] == drawn


def test_dvdp_with_another_lift_is_not_beside_that_with_the_papers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"overrides": {"sampling": {"lift": "data"}}}
    settings = {
        "ddpm": {"process": "ddpm"},
        "dvdp-300": {"process": "dvdp", "turning_points": [300]},
        "dvdp-600": {"process": "dvdp", "turning_points": [600], **data},
    }
    results = study(tmp_path, settings=settings, sampling={"count": 16}, evaluation={"samples": 16, "kid_subset": 8})
    assert [setting.turning_points for setting in known_settings(results)] == [(), (300,)]
