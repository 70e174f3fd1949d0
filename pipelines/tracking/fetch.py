"""Weights that somebody else has trained: a training hash names all that shapes them, so once is enough."""

from __future__ import annotations

import json
import logging
import tempfile
import threading
from pathlib import Path

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.entities.logged_model_status import LoggedModelStatus

from dvdp.errors import UserError
from dvdp.files import locked, write_atomically
from dvdp.training.loop import is_finished
from pipelines.addresses import public
from pipelines.jobs.job import Job
from pipelines.tracking.connection import connect, impatient, there_is_a_store
from pipelines.tracking.registry import WEIGHTS_DIGEST, read_weights, weights_digest
from pipelines.tracking.runs import TRAINING_HASH, read_text

logger = logging.getLogger("dvdp.tracking")
#: One setting at a time, as the environment says how long MLflow is waited for.
_asking = threading.Lock()


def fetch_training(job: Job) -> str:
    """Take the weights and the ledger of a job's training from MLflow, unless they are here.

    Nothing is unpickled: the weights are a safetensors file, which counts if its digest is the one that was registered.

    Returns:
        One sentence for the log; the empty string where there is nothing to do or to be had, a server that does not
        answer included: the job is trained then.
    """
    with locked(job.folder / "driver.lock", patience=0) as free:
        if not free or is_finished(job.folder) or not there_is_a_store():
            return ""
        try:
            with _asking, impatient():
                client = connect()
                found = _candidates(client, job)
            return next((said for model in found if (said := _take(client, job, model))), "")
        except Exception as error:  # Whatever it is, training remains.
            logger.warning("%s: its weights cannot be fetched from MLflow (%s), so it is trained here", job.name, error)
            return ""


def _candidates(client: MlflowClient, job: Job) -> list[LoggedModel]:
    experiment = client.get_experiment_by_name(job.params.tracking.experiment)
    if experiment is None:
        return []
    query = f"tags.`{TRAINING_HASH}` = '{job.training_hash}'"
    found = client.search_logged_models([experiment.experiment_id], query)
    return [model for model in found if model.status == LoggedModelStatus.READY]


def _take(client: MlflowClient, job: Job, model: LoggedModel) -> str:
    run = str(model.source_run_id)
    ledger, estimate = (read_text(client, run, name) for name in ("metrics.jsonl", "estimate.json"))
    if ledger is None:  # Of an earlier release; the report shows how training went.
        return ""
    with tempfile.TemporaryDirectory() as folder:
        address = f"{model.artifact_location}/artifacts/{job.weights.name}"
        copy = mlflow.artifacts.download_artifacts(address, dst_path=folder, tracking_uri=client.tracking_uri)
        about, state = read_weights(Path(copy))
        found = {TRAINING_HASH: about.get("training_hash"), WEIGHTS_DIGEST: weights_digest(about, state)}
        if not found.items() <= model.tags.items():
            raise UserError(f"found other weights at {public(address)} than its tags say")
        write_atomically(job.folder / "metrics.jsonl", ledger)
        if estimate is not None:
            write_atomically(job.folder / "estimate.json", estimate)
        write_atomically(job.folder / "run.json", json.dumps(about, indent=2) + "\n")
        write_atomically(job.weights, Path(copy).read_bytes())  # Last, as it says that training is finished.
    return f"{job.name}: weights of training {job.training_hash} fetched from run {run} of MLflow, not trained again"
