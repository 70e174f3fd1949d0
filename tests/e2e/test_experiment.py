"""The experiment as a whole: settings that fail beside those that do not."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable

import psutil
import pytest
from mlflow import MlflowClient

from tests.e2e.support import Project, sentence
from tests.jobs.test_cluster import is_loopback, listening


def sockets(pid: int) -> set[tuple[str, str]]:
    """Names of a command and all that it started, with the addresses that they listen on."""
    found = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                found |= {(each.name(), socket.laddr.ip) for socket in listening(each)}
    return found


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
    process, heard = here.start("dvdp", "experiment", "--reports", "reports"), set()
    while process.poll() is None:
        heard |= sockets(process.pid)
        time.sleep(0.5)
    printed = here.finish(process, status=1)
    assert {"gcs_server", "raylet", "python"} <= {name for name, _ in heard}, "Ray and the temporary Prefect server"
    assert [each for each in heard if not is_loopback(each[1])] == []
    said = sentence(printed)
    assert said.startswith("wild failed: loss: found nan after ")
    assert "of wild seed 0, expected a finite number" in said

    reports = here.folder / "reports"
    assert list(json.loads((reports / "metrics.json").read_text())) == ["ddpm"]
    assert "<strong>wild failed:</strong> loss: found nan after " in (reports / "index.html").read_text()

    client = MlflowClient(f"sqlite:///{here.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("dvdp")
    assert experiment is not None
    found = {run.info.run_name.partition(",")[0]: run for run in client.search_runs([experiment.experiment_id])}
    assert {name: run.info.status for name, run in found.items()} == {
        "wild": "FAILED",
        "ddpm": "FINISHED",
        "digits: ddpm": "FINISHED",
    }
    comparison = found["digits: ddpm"]
    assert re.fullmatch(r"digits: ddpm, fd_labels \d+\.\d+( ± \d+\.\d+)?", comparison.info.run_name)
    assert comparison.data.metrics["score_best"] == comparison.data.metrics["ddpm/score"]
    assert comparison.data.metrics["ddpm/training_speedup"] == 1
    (page,) = re.findall(r"MLflow:  make ui, then open http://127.0.0.1:5000(\S+)", printed)
    assert page == f"/#/experiments/{experiment.experiment_id}/runs"
    paper = client.list_artifacts(comparison.info.run_id, "paper")
    assert {artifact.path for artifact in paper} == {f"paper/tables.{kind}" for kind in ("csv", "html", "md")}
    assert found["ddpm"].data.metrics["seconds_per_sample"] > 0
    assert "log.txt" in {artifact.path for artifact in client.list_artifacts(found["ddpm"].info.run_id)}
    assert "Steps count training images" in found["ddpm"].data.tags["mlflow.note.content"]
    (version,) = client.search_model_versions("name = 'dvdp-digits'")
    assert version.run_id == found["ddpm"].info.run_id
    assert client.get_model_version_by_alias("dvdp-digits", "champion").version == version.version
    for part in ("| fd_labels ↓ |", 'load_model("models:/dvdp-digits/1")', "CC BY 4.0", "**Mind**", "training hash"):
        assert part in version.description, part
