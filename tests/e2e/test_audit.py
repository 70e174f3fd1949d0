"""`dvdp audit` as a command: resumed, tracked, and clear about what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.e2e.support import Project, sentence
from tests.tracking.support import free_port


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_audit_is_resumed_drawn_and_tracked(undisturbed: Project, tmp_path: Path) -> None:
    here = undisturbed.copy(tmp_path / "project")
    command = ("dvdp", "audit", "--setting", "dvdp-600", "--solver-steps", "12")

    # MLflow is unavailable: the audit is made all the same, and that is said.
    done = here.run(*command, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{free_port()}")
    assert sentence(done.stderr).startswith("tracking: MLflow at http://127.0.0.1:")
    assert "the lift at t = 600" in done.stdout
    assert "of which the solver (against ddpm, 12 steps)" in done.stdout
    folder = here.runs()["dvdp-600"] / "audits"
    (result,) = folder.glob("*.json")
    before = result.read_text()
    assert set(json.loads(before)["scores"]) == {"free", "before_1", "after_1", "real", "solver"}

    # What is drawn is not drawn again, and what is drawn again is the same.
    shards = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*.npy")}
    assert len(shards) == 5
    (lost,) = (path for path in shards if path.parent.name == "before_1")
    shutil.rmtree(result.with_suffix(""))
    for path in (result, result.with_suffix(".png"), lost):
        path.unlink()
    printed = here.run(*command).stdout
    assert result.read_text() == before
    assert {path for path in shards if path.stat().st_mtime_ns != shards[path]} == {lost}

    # A third time nothing is done but told and tracked, once.
    assert here.run(*command).stdout == printed
    client = MlflowClient(f"sqlite:///{here.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("dvdp")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "dvdp-600"
    assert run.info.status == "FINISHED"
    costs = {"level_1", "lift_1", "level_0", "total", "solver", "error"}
    assert {name for name in run.data.metrics if name.startswith("audit/cost/")} == {f"audit/cost/{c}" for c in costs}
    assert len(client.get_metric_history(run.info.run_id, "audit/cost/level_1")) == 1
    artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id, "audit")}
    assert artifacts == {f"audit/{result.name}", f"audit/{result.stem}.png"}

    # Without turning points there is the solver alone; of this setting, no solver either.
    assert "the lift" not in here.run("dvdp", "audit", "--setting", "ddpm", "--solver-steps", "6").stdout

    for more, told in (
        (("--images", "1798"), "--images: found 1798, expected at least 64 (fewer say nothing) and at most 1,797"),
        (("--solver-steps", "1"), "--solver-steps: found 1, expected at least 2 (one for each level)"),
        (("--seed", "7"), "--setting, --seed: found no such run"),
    ):
        assert sentence(here.run(*command, *more, status=2).stderr).startswith(told)
    for missing, told in (
        (here.folder / "data" / "digits" / "reference", "reference: found no file"),
        (here.folder / "data" / "digits" / "extractor", "extractor: found no file"),
        (folder.parent, "audit: found no weights of dvdp-600 in 'runs/"),
    ):
        shutil.rmtree(missing)
        assert sentence(here.run(*command, status=2).stderr).startswith(told)
