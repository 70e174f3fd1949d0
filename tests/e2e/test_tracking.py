"""A real MLflow server that goes down: training goes on, nothing is lost, nothing is done twice."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from dvdp.training import ledger
from pipelines.addresses import healthy
from pipelines.tracking.connection import connect
from tests.e2e.support import Project, end, sentence, tracked_once, wait_until
from tests.tracking.support import free_port

pytestmark = pytest.mark.timeout(900)

ONE = {"settings": {"dvdp-600": {"process": "dvdp", "turning_points": [600]}}}
COMMAND = ("dvdp", "experiment", "--reports", "reports")


@contextlib.contextmanager
def mlflow_server(project: Project, port: int) -> Iterator[None]:
    """A server over sqlite in the project's folder, killed at the end of the block."""
    store = ["--backend-store-uri", f"sqlite:///{project.folder / 'server.db'}"]
    artifacts = ["--artifacts-destination", (project.folder / "server").as_uri()]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    process = project.start(*command, *store, *artifacts, log="server.log", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    try:
        wait_until(lambda: healthy(f"http://127.0.0.1:{port}/health", 2), process)
        yield
    finally:
        end(process)


@pytest.mark.slow
def test_training_goes_on_while_the_server_is_unavailable_and_nothing_is_lost(project: Callable[..., Project]) -> None:
    here, port = project(**ONE, training={"images": 9600}), free_port()
    address = f"http://127.0.0.1:{port}"

    def logged() -> int:
        return sum(len(ledger.read(path)) for path in here.folder.glob("runs/*/metrics.jsonl"))

    with mlflow_server(here, port):
        process = here.start(*COMMAND, MLFLOW_TRACKING_URI=address)
        wait_until(here.checkpoints, process)
    before = logged()
    wait_until(lambda: logged() >= before + 5, process)
    with mlflow_server(here, port):
        here.finish(process)
        tracked_once(here, "dvdp-600", address)
        assert len(models(address)) == 1
    assert not (here.folder / "mlflow.db").exists()


@pytest.mark.soak
def test_an_experiment_without_its_server_is_replayed_later_and_not_trained_again(
    project: Callable[..., Project],
) -> None:
    here, port = project(**ONE, training={"images": 1600}), free_port()
    address = f"http://127.0.0.1:{port}"
    done = here.run(*COMMAND, status=1, MLFLOW_TRACKING_URI=address)
    said = sentence(done.stderr)
    assert said.startswith(f"tracking: MLflow at {address} did not take everything")
    assert said.endswith("it is all in runs, and running the same command again replays it.")
    assert (here.folder / "reports" / "index.html").is_file()
    before = files(here)

    with mlflow_server(here, port):
        here.run(*COMMAND, MLFLOW_TRACKING_URI=address)
        tracked_once(here, "dvdp-600", address)
        assert len(models(address)) == 1
    assert files(here) == before


@pytest.mark.soak
def test_a_deleted_experiment_stops_before_work_and_later_costs_neither_score_nor_report(
    project: Callable[..., Project],
) -> None:
    here = project(**ONE, training={"images": 1600})
    client = connect(here.folder)
    experiment = client.create_experiment("dvdp")
    client.delete_experiment(experiment)
    said = sentence(here.run(*COMMAND, status=2).stderr)
    assert said.startswith("tracking.experiment: found 'dvdp' deleted in MLflow, expected an active one; restore it")
    assert not here.runs()

    client.restore_experiment(experiment)
    process = here.start(*COMMAND)
    wait_until(here.runs, process)
    client.delete_experiment(experiment)
    said = sentence(here.finish(process, status=1))
    assert said.startswith("tracking.experiment: found 'dvdp' deleted in MLflow, expected an active one; restore it")
    assert said.endswith("it is all in reports, to be replayed by the same command after that.")
    assert (here.folder / "reports" / "index.html").is_file()
    before = files(here)

    client.restore_experiment(experiment)
    here.run(*COMMAND)
    tracked_once(here, "dvdp-600")
    assert files(here) == before


@pytest.mark.soak
def test_two_first_experiments_at_once_register_every_run_once(project: Callable[..., Project]) -> None:
    here = project(**ONE, training={"images": 1600})
    both = [here.start(*COMMAND, log=f"{number}.log") for number in (1, 2)]
    for number, process in enumerate(both, start=1):
        here.finish(process, log=f"{number}.log")
    tracked_once(here, "dvdp-600")
    client = connect(here.folder)
    assert len(models(client.tracking_uri)) == 1
    (experiment,) = (found for found in client.search_experiments() if found.name == "dvdp")
    assert len(client.search_logged_models([experiment.experiment_id])) == 1
    # The run and the comparison.
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 2
    for run in runs:
        for name in run.data.metrics:
            steps = [metric.step for metric in client.get_metric_history(run.info.run_id, name)]
            assert len(steps) == len(set(steps)), name


def models(address: str) -> list[str]:
    """The registered versions, the champion among them."""
    client = MlflowClient(address)
    assert client.get_model_version_by_alias("dvdp-digits", "champion").version
    return [str(version.version) for version in client.search_model_versions("name = 'dvdp-digits'")]


def files(project: Project) -> dict[Path, int]:
    """When weights, samples and scores were written."""
    patterns = ("weights.safetensors", "samples/*/*.npy", "scores/*.json", "metrics.jsonl")
    paths = [path for pattern in patterns for path in project.folder.glob(f"runs/*/{pattern}")]
    assert len(paths) == 4
    return {path: path.stat().st_mtime_ns for path in paths}
