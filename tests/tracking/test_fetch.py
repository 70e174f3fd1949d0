"""Weights that MLflow has are fetched in place of a training, if they are what was registered."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from dvdp.config import parse_params
from dvdp.files import locked
from dvdp.models.export import load_model, save_model
from dvdp.models.unet import UNet
from dvdp.training import ledger
from pipelines.jobs.job import Job
from pipelines.tracking import registry
from pipelines.tracking.fetch import fetch_training
from pipelines.tracking.runs import TRAINING_HASH, open_run
from tests.logs import hearing
from tests.tracking.support import empty_store, small_run, write_ledger

Fetch = Callable[[Job], tuple[str, str]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one finished training, whose folder is ``first``."""
    folder = tmp_path_factory.mktemp("shared")
    client, job = empty_store(folder), a_job(folder / "first")
    job.folder.mkdir(parents=True)
    write_ledger(job.folder, {100: 1.5, 200: 1.25})
    about = {"run": job.run.describe(), "training_hash": job.training_hash, "labels": [], "label_counts": [0]}
    save_model(job.weights, UNet(job.run.model, 1).state_dict(), about)
    run = open_run(client, "dvdp", TRAINING_HASH, job.training_hash, "first")
    run.log_file(job.folder / "metrics.jsonl")
    run.log_text("estimate.json", "{}")
    registry.register(run, "dvdp-digits", job.weights, {TRAINING_HASH: job.training_hash})
    return folder


def a_job(storage: Path, seed: int = 0) -> Job:
    params = parse_params({"cluster": {"storage": str(storage)}})
    return Job(params, small_run(seed=seed), "digest")


@pytest.fixture
def fetch(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Fetch:
    """What is returned and what is logged."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shared / 'mlflow.db'}")

    def call(job: Job) -> tuple[str, str]:
        said: list[str] = []
        with hearing(said.append):
            return fetch_training(job), " ".join(said)

    return call


def test_a_colleague_gets_the_weights_and_the_ledger(shared: Path, fetch: Fetch, tmp_path: Path) -> None:
    first, job = a_job(shared / "first"), a_job(tmp_path / "runs")
    said, warned = fetch(job)
    assert said.startswith(f"{job.name}: weights of training {job.training_hash} fetched from run ")
    assert said.endswith(" of MLflow, not trained again")
    assert not warned
    assert job.weights.read_bytes() == first.weights.read_bytes()
    assert ledger.read(job.folder / "metrics.jsonl") == ledger.read(first.folder / "metrics.jsonl")
    assert {"estimate.json", "run.json"} <= {path.name for path in job.folder.iterdir()}
    assert load_model(job.weights).run == job.run

    job.weights.write_text("as it was")
    assert fetch(job) == ("", ""), "what is here stays"
    assert job.weights.read_text() == "as it was"


def test_another_training_is_not_taken_for_it(fetch: Fetch, tmp_path: Path) -> None:
    job = a_job(tmp_path / "runs", seed=1)
    other = replace(job, run=replace(job.run, seed=0), dataset_digest="other")
    assert fetch(job) == fetch(other) == ("", "")
    assert not job.weights.exists()


def test_while_somebody_trains_it_nothing_is_fetched(fetch: Fetch, tmp_path: Path) -> None:
    job = a_job(tmp_path / "runs")
    with locked(job.folder / "driver.lock"):
        assert fetch(job) == ("", "")


@pytest.mark.parametrize("damage", ["other weights", "a pickle", "gone"])
def test_weights_other_than_those_registered_are_refused(
    damage: str, shared: Path, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = a_job(tmp_path / "runs")
    client = MlflowClient(f"sqlite:///{shared / 'mlflow.db'}")
    (model,) = client.search_logged_models(["1"])
    kept = Path(model.artifact_location.removeprefix("file://")) / "artifacts" / "weights.safetensors"
    shutil.copy(kept, tmp_path / "copy")
    try:
        if damage == "other weights":
            about, state = registry.read_weights(kept)
            save_model(kept, {name: tensor + 1 for name, tensor in state.items()}, about)
        elif damage == "a pickle":
            kept.write_bytes(pickle.dumps({"weights": torch.zeros(3)}))
        else:
            kept.unlink()
        said, warned = fetch(job)
    finally:
        shutil.copy(tmp_path / "copy", kept)
    assert said == ""
    assert warned.startswith(f"{job.name}: its weights cannot be fetched from MLflow (")
    assert warned.endswith("), so it is trained here")
    assert not job.weights.exists()


def test_a_server_that_does_not_answer_is_no_reason_to_wait(
    fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    said, warned = fetch(a_job(tmp_path / "runs"))
    assert said == ""
    assert "so it is trained here" in warned
