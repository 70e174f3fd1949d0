"""The experiment as a whole: settings that fail beside those that do not."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from mlflow import MlflowClient

from tests.e2e.support import Project, sentence


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_setting_that_fails_does_not_stop_the_others(project: Callable[..., Project]) -> None:
    wild = {"training": {"learning_rate": 100.0, "clip_norm": 1e9, "warmup_images": 0}}
    here = project(
        settings={
            "wild": {"process": "dvdp", "turning_points": [600], "overrides": wild},
            "ddpm": {"process": "ddpm"},
        },
        training={"images": 1600},
    )
    done = here.run("dvdp", "experiment", "--reports", "reports", status=1)
    said = sentence(done.stderr)
    assert said.startswith("wild failed: loss: found nan after ")
    assert "of wild seed 0, expected a finite number" in said

    reports = here.folder / "reports"
    assert list(json.loads((reports / "metrics.json").read_text())) == ["ddpm"]
    assert "<strong>wild failed:</strong> loss: found nan after " in (reports / "index.html").read_text()

    client = MlflowClient(f"sqlite:///{here.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("dvdp")
    assert experiment is not None
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert {name: run.info.status for name, run in found.items()} == {
        "wild": "FAILED",
        "ddpm": "FINISHED",
        "comparison on digits": "FINISHED",
    }
    paper = client.list_artifacts(found["comparison on digits"].info.run_id, "paper")
    assert {artifact.path for artifact in paper} == {f"paper/tables.{kind}" for kind in ("csv", "html", "md")}
    assert found["ddpm"].data.metrics["seconds_per_sample"] > 0
    assert [v.run_id for v in client.search_model_versions("name = 'dvdp-digits'")] == [found["ddpm"].info.run_id]
