"""The scheduled deployment on the services of `make services`: real servers, a real worker, a run to its end."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.addresses import services_environment
from tests.e2e.support import Project, sentence, tracked_once
from tests.tracking.support import free_port

pytestmark = pytest.mark.slow

NAME = "experiment/experiment"


@pytest.fixture
def here(reproduced: Project, tmp_path: Path) -> Iterator[Project]:
    """Data and lock file of a `dvc repro`, but no runs yet."""
    project = reproduced.copy(tmp_path / "project", training={"images": 1600})
    for name in ("runs", "mlartifacts"):
        shutil.rmtree(project.folder / name)
    for name in ("mlflow.db", "mlflow.db.lock"):
        (project.folder / name).unlink()
    yield project
    project.close()


@pytest.fixture
def services(here: Project) -> Iterator[dict[str, str]]:
    """Addresses of the services of this project."""
    command = (sys.executable, "-m", "infra.services")
    ports = ("--mlflow-port", str(free_port()), "--prefect-port", str(free_port()))
    try:
        here.run(*command, "up", *ports)
        yield services_environment(here.folder, timeout=20)
    finally:
        here.run(*command, "down")


@pytest.mark.timeout(900)
def test_the_scheduled_deployment_runs_to_its_end_and_writes_nothing_that_dvc_tracks(
    here: Project, services: dict[str, str]
) -> None:
    before = contents(here.folder / "reports")
    here.run("prefect", "--no-prompt", "deploy", "--all", **services)
    shown = here.run("prefect", "deployment", "inspect", NAME, "--output", "json", **services).stdout
    deployment = json.loads(shown)
    (schedule,) = deployment["schedules"]
    assert schedule["active"]
    assert schedule["schedule"]["cron"]
    assert deployment["work_pool_name"] == "dvdp"
    assert deployment["parameters"] == {"params_file": "params.yaml", "reports": None}

    here.run("prefect", "deployment", "run", NAME, "--watch", "--watch-timeout", "400", **services)

    assert contents(here.folder / "reports") == before
    assert here.run("dvc", "status").stdout.strip() == "Data and pipelines are up to date."
    assert here.run("git", "status", "--porcelain").stdout == ""
    assert [path.name for path in here.folder.glob("runs/reports/*/index.html")] == ["index.html"]
    address = services["MLFLOW_TRACKING_URI"]
    for setting in ("ddpm", "dvdp-600"):
        tracked_once(here, setting, address)
    assert MlflowClient(address).get_model_version_by_alias("dvdp-digits", "champion").version


@pytest.mark.timeout(900)
def test_data_other_than_dvc_lock_names_are_refused(here: Project) -> None:
    with (here.folder / "data" / "digits" / "store" / "data-00000.mdb").open("ab") as file:
        file.write(bytes(4096))
    said = sentence(here.run("dvdp", "experiment", status=2).stderr)
    assert said.startswith("dataset: found 'data/digits/store' other than dvc.lock names it, expected it unchanged")
    assert not (here.folder / "runs").exists()


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder, with the time of its last change."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
