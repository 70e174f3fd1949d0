"""The scheduled deployment on the services of `make services`: real servers, a real worker, a run to its end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from mlflow import MlflowClient

from pipelines.addresses import PREFECT_SECRET, services_environment
from tests.e2e.support import Project, sentence, tracked_once
from tests.tracking.support import free_port, wait_until
from tests.webhooks import listening

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
def webhook() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Its address, and what it was told."""
    with listening() as found:
        yield found


@pytest.fixture
def services(here: Project, webhook: tuple[str, list[tuple[str, bytes]]]) -> Iterator[dict[str, str]]:
    """Addresses of the services of this project."""
    command = (sys.executable, "-m", "infra.services")
    ports = ("--mlflow-port", str(free_port()), "--prefect-port", str(free_port()))
    try:
        here.run(*command, "up", *ports, DVDP_WEBHOOK=webhook[0])
        found = services_environment(here.folder, timeout=20)
        # For asked, planned and logs.
        address = urlsplit(found["PREFECT_API_URL"])
        yield found | {"PREFECT_API_URL": address._replace(netloc=f"{found[PREFECT_SECRET]}@{address.netloc}").geturl()}
    finally:
        here.run(*command, "down")


@pytest.mark.timeout(1500)
def test_the_scheduled_deployment_can_be_cancelled_and_runs_to_its_end_and_writes_nothing_that_dvc_tracks(
    here: Project, services: dict[str, str], webhook: tuple[str, list[tuple[str, bytes]]]
) -> None:
    before = contents(here.folder / "reports")
    # The recipe of docs/prefect.md, in a shell without an activated environment.
    shell(here, "prefect --no-prompt deploy --all")
    shown = shell(here, f"prefect deployment inspect {NAME} --output json")
    deployment = json.loads(shown)
    (schedule,) = deployment["schedules"]
    assert schedule["active"]
    assert schedule["schedule"]["cron"]
    assert deployment["work_pool_name"] == "dvdp"
    assert deployment["parameters"] == {"params_file": "params.yaml", "reports": None}

    # The server plans the next runs, Mondays at three.
    wait_until(lambda: len(planned(services["PREFECT_API_URL"], deployment["id"])) >= 3, 120)

    longer = """--param 'overrides={"training.images": 960000}'"""
    shell(here, f"prefect deployment run {NAME} {longer}")
    api = services["PREFECT_API_URL"]
    wait_until(lambda: ray_processes(here), 200)
    (run,) = [each for each in asked(api, "flow_runs") if each["state_type"] == "RUNNING"]
    wait_until(lambda: [line for line in logs(api, run) if line["task_run_id"] and "images/s" in line["message"]], 120)
    commit = here.run("git", "rev-parse", "HEAD").stdout[:9]
    assert run["name"] == f"digits at {commit}"
    shell(here, f"prefect flow-run cancel {run['id']}")
    wait_until(lambda: not ray_processes(here), 30)
    states = {"CANCELLED", "COMPLETED"}  # The second is that of the `dvc repro` before.
    wait_until(lambda: {each["state_type"] for each in asked(api, "flow_runs")} == states, 120)
    told = [json.loads(body) for _, body in webhook[1]]
    assert {(each["flow_run"], each["state"]) for each in told} == {(run["name"], "CANCELLING")}

    shell(here, f"prefect deployment run {NAME} --watch --watch-timeout 400")

    # What the cancelled run left of its tasks was ended by the next.
    states = {task["state_type"] for task in asked(api, "task_runs")}
    assert states <= {"COMPLETED", "CRASHED", "CANCELLED", "FAILED"}
    assert all(artifact["description"] for artifact in asked(api, "artifacts") if artifact["key"])
    assert contents(here.folder / "reports") == before
    assert here.run("dvc", "status").stdout.strip() == "Data and pipelines are up to date."
    assert here.run("git", "status", "--porcelain").stdout == ""
    assert [path.name for path in here.folder.glob("runs/reports/*/index.html")] == ["index.html"]
    address = services["MLFLOW_TRACKING_URI"]
    for setting in ("ddpm", "dvdp-600"):
        tracked_once(here, setting, address)
    champion = MlflowClient(address).get_model_version_by_alias("dvdp-digits", "champion")

    # The champion's images, and its score as the params of this run say.
    fewer = """--param 'overrides={"sampling.steps": 4, "sampling.count": 64, "evaluation.samples": 64}'"""
    shell(here, f"prefect deployment run generate/generate {fewer} --param out=drawn --watch --watch-timeout 200")
    assert sorted(path.name for path in (here.folder / "drawn").glob("*.png")) == [f"{i:08d}.png" for i in range(64)]
    shell(here, f"prefect deployment run re-evaluate/re-evaluate {fewer} --watch --watch-timeout 200")
    client = MlflowClient(address)
    query = f"attributes.run_name = 'evaluation' and tags.`mlflow.parentRunId` = '{champion.run_id}'"
    (scored,) = client.search_runs([client.get_run(champion.run_id).info.experiment_id], query)
    assert scored.data.params["samples"] == "64"
    messages = {each["state"]["message"] for each in asked(api, "flow_runs")}
    assert f"64 images of dvdp-digits version {champion.version} in drawn." in messages
    assert {"generated", "re-evaluation"} <= {artifact["key"] for artifact in asked(api, "artifacts")}


def shell(project: Project, command: str) -> str:
    """What a command prints in a shell that knows nothing but the services' own word."""
    bare = {"PATH": "/usr/bin:/bin", "HOME": str(project.folder.parent), "PYTHONPATH": str(project.folder)}
    script = f'eval "$({sys.executable} -m infra.services env)" && {command}'
    done = subprocess.run(
        ["sh", "-c", script], cwd=project.folder, env=bare, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def asked(api: str, what: str) -> list[dict[str, Any]]:
    """Everything of a kind that a Prefect server knows and that is no plan for later."""
    found: list[dict[str, Any]] = httpx.post(f"{api}/{what}/filter", json={}, timeout=30).json()
    return [each for each in found if each.get("state_type") != "SCHEDULED"]


def planned(api: str, deployment: str) -> list[str]:
    """When the runs of a deployment's schedule will begin."""
    body = {"deployments": {"id": {"any_": [deployment]}}, "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    found = httpx.post(f"{api}/flow_runs/filter", json=body, timeout=30).json()
    return sorted(each["expected_start_time"] for each in found if each["auto_scheduled"])


def logs(api: str, run: dict[str, Any]) -> list[dict[str, Any]]:
    """All lines of a flow run."""
    body = {"logs": {"flow_run_id": {"any_": [run["id"]]}}}
    found: list[dict[str, Any]] = httpx.post(f"{api}/logs/filter", json=body, timeout=30).json()
    return found


def ray_processes(project: Project) -> list[psutil.Process]:
    """Of runs in a project's folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        line, environment = " ".join(process.info["cmdline"] or []), process.info["environ"] or {}
        ours = environment.get("DVDP_SERVICES") == str(project.folder / ".services")
        if ours and process.status() != psutil.STATUS_ZOMBIE and ("RayTrainWorker" in line or "raylet" in line):
            found.append(process)
    return found


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
