"""A study trains and scores its settings, and what reads a study finds its networks."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from dvdp.config import read_params
from tests.benchmarks.support import run_module

PROJECT = Path(__file__).parents[2]

PARAMS = {
    "dataset": {"name": "digits", "source": "digits", "resolution": 16, "encoding": "raw"},
    "schedule": {"timesteps": 1000},
    "settings": {
        "ddpm": {"process": "ddpm"},
        "dvdp-500": {"process": "dvdp", "turning_points": [500]},
        "subspace-500": {"process": "subspace", "turning_points": [500]},
    },
    "seeds": [0, 1],
    "model": {
        "model_channels": 8,
        "channel_mult": [1, 1],
        "num_res_blocks": 1,
        "attention_factors": [2],
        "num_head_channels": 8,
        "num_classes": 0,
    },
    "training": {"images": 64, "batch": 8, "warmup_images": 8, "checkpoint_images": 64, "preview_images": 0},
    "sampling": {"count": 64, "steps": 8, "batch": 32},
    "evaluation": {"extractor": "labels", "samples": 64, "kid_subset": 20, "extractor_epochs": 1},
}


@pytest.mark.parametrize("path", sorted((PROJECT / "benchmarks").glob("study_*.yaml")), ids=lambda path: path.stem)
def test_every_committed_study_is_params_of_unconditional_networks(path: Path) -> None:
    """As docs/study.md says of all but the last, whose figures are those of the pipeline."""
    params = read_params(path)
    assert {run.model.num_classes for run in params.runs()} == {0}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder; ``work`` in it has what was trained."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    measured(folder, "study")
    return folder


def measured(folder: Path, name: str, *options: object) -> dict:
    """What a benchmark wrote of the study in a folder."""
    out = folder / f"{name}.json"
    done = run_module(
        f"benchmarks.{name}", "--params", folder / "params.yaml", "--work", folder / "work", *options, "--out", out
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_every_setting_is_scored_for_every_seed_at_equal_flops(study: Path) -> None:
    found = json.loads((study / "study.json").read_text())
    assert [(row["seed"], row["setting"]) for row in found["runs"]] == [
        (seed, setting) for seed in (0, 1) for setting in PARAMS["settings"]
    ]
    for name, mean in found["summary"].items():
        scores = [row["fd_labels"] for row in found["runs"] if row["setting"] == name]
        assert mean["mean"] == pytest.approx(sum(scores) / 2, abs=1e-3)
        assert mean["spread"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5, abs=1e-3)
    images = {row["setting"]: row["images"] for row in found["runs"]}
    assert images["ddpm"] == 64 < images["dvdp-500"]


def test_a_study_that_is_started_again_trains_nothing_twice(study: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in study.glob("work/runs/*/weights.safetensors")}
    scores = [row["fd_labels"] for row in json.loads((study / "study.json").read_text())["runs"]]
    again = measured(study, "study")
    assert [row["fd_labels"] for row in again["runs"]] == scores
    assert before
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_few_steps_are_compared_with_the_studys_own_sampling(study: Path) -> None:
    found = measured(study, "few_steps", "--settings", "dvdp-500", "--steps", 4)
    many = {row["seed"]: row for row in found["runs"] if row["steps"] == 8}
    assert sorted(many) == [0, 1]
    few = [row for row in found["runs"] if row["steps"] == 4]
    assert {row["setting"] for row in few} == {"dvdp-500"}
    for row in few:
        assert row["over_many_steps"] == pytest.approx(row["score"] / many[row["seed"]]["score"], rel=1e-2)


def test_both_variances_are_scored_at_each_number_of_steps(study: Path) -> None:
    found = measured(study, "variances", "--settings", "dvdp-500", "--steps", 4, 8)
    assert [(row["seed"], row["steps"]) for row in found["runs"]] == [(0, 4), (0, 8), (1, 4), (1, 8)]
    for row in found["runs"]:
        small, large = row["fixed_small"], row["fixed_large"]
        assert small["finest_band"] < large["finest_band"], "more noise in each step makes more detail"
        assert small["score"] != large["score"]
    rows = json.loads((study / "study.json").read_text())["runs"]
    known = {row["seed"]: row["fd_labels"] for row in rows if row["setting"] == "dvdp-500"}
    assert {row["seed"]: row["fixed_small"]["score"] for row in found["runs"] if row["steps"] == 8} == known


def test_lifts_with_the_datas_variance_change_subspace_diffusion_alone(study: Path) -> None:
    found = measured(study, "lifts")
    for row in found["runs"]:
        (nats,) = row["nats"]
        if row["process"] == "subspace":
            assert nats > 0
            assert row["noise"] != row["data"]
        else:
            assert row["noise"] == pytest.approx(row["data"], rel=1e-2)
    assert found["summary"].keys() == {f"{n}-500, lift {w}" for n in ("dvdp", "subspace") for w in ("noise", "data")}


def test_trained_settings_are_audited(study: Path) -> None:
    found = measured(study, "study_audit", "--settings", "dvdp-500", "--steps", 4)
    assert found["sampling"]["steps"] == 4
    for row in found["runs"]:
        assert row["costs"].keys() >= {"level_0", "level_1", "lift_1"}
        scores = row["scores"]
        assert sum(row["costs"].values()) == pytest.approx(scores["free"] - scores["real"], abs=1e-3)


def test_settings_that_do_not_exist_or_were_not_trained_are_named(study: Path, tmp_path: Path) -> None:
    def asked(work: Path, *settings: str) -> subprocess.CompletedProcess[str]:
        params = ("--params", study / "params.yaml", "--work", work)
        return run_module("benchmarks.study_audit", *params, "--settings", *settings, "--out", tmp_path / "none.json")

    done = asked(study / "work", "dvdp-500", "absent")
    assert "found absent, expected some of ddpm, dvdp-500, subspace-500" in done.stderr
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "digits").symlink_to(study / "work" / "digits")
    done = asked(tmp_path / "work", "dvdp-500")
    assert "dvdp-500, seed 1: not trained, left out" in done.stderr
    assert "found no trained run of dvdp-500 in" in done.stderr
    assert not (tmp_path / "none.json").exists()
