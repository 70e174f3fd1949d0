"""A job's run in MLflow, and what leads back from it."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from dvdp import tensors
from dvdp.config import Params, Run
from dvdp.data.store import ImageStore
from dvdp.identity import training_identity
from dvdp.models.export import KIND, save_model
from dvdp.training.loop import is_finished
from pipelines.jobs.job import Job
from pipelines.jobs.paths import DataPaths
from pipelines.provenance import provenance
from pipelines.tracking.connection import TrackingUnavailable, connect, impatient, usable
from pipelines.tracking.registry import create_registered_model, read_weights
from pipelines.tracking.runs import (
    DATASET,
    DATASET_DIGEST,
    FLOW_RUN,
    PARAMS_DIGEST,
    SAMPLING_HASH,
    SEED,
    SETTING,
    START,
    TRAINING_HASH,
    TURNING_POINTS,
    TrackedRun,
    open_run,
)

logger = logging.getLogger("dvdp.tracking")


def check_tracking(job: Job) -> None:
    """Try all that tracking will be asked for, on the run of a job that is about to begin.

    A server that does not answer is no reason to stop: what it would hold waits on disk.

    Raises:
        UserError: MLflow can never take the run, as things stand.
    """
    try:
        client = connect()
        with usable(client.tracking_uri), impatient():
            run = tracked(job)
            run.log_json("params.json", job.params.describe())
            client.search_logged_models([run.experiment_id], max_results=1)
            create_registered_model(client, model_name(job.params))
            state = client.get_run(run.run_id)
            if state.info.status == "RUNNING" and not state.data.tags.get(FLOW_RUN):
                # It does not run yet; should the command end before the flow begins, nothing else would say so.
                client.update_run(run.run_id, status="SCHEDULED")
    except TrackingUnavailable:
        logger.warning("MLflow does not answer now; the run goes on, and what it would log waits on disk")


def tracked(job: Job) -> TrackedRun:
    """The job's run in MLflow, with all that is known before training.

    A run is one way of sampling from one training: what is trained once and sampled twice makes two.
    """
    params = job.params
    run = open_run(connect(), params.tracking.experiment, SAMPLING_HASH, job.sampling_hash, job.name)
    store = ImageStore(DataPaths.of(params).store)
    run.log_params({**training_identity(job.run), "flip": params.dataset.flip})
    run.log_dataset(params.dataset.name, job.dataset_digest, store.images(range(min(16, len(store)))))
    run.set_tags(description(job))
    return run


def description(job: Job) -> dict[str, str]:
    """What leads back from a trained run to where it comes from: as it was when the run was trained."""
    digest = hashlib.sha256(json.dumps(job.run.describe(), sort_keys=True).encode()).hexdigest()
    if is_finished(job.folder):
        known = _about(job)
        kept = {name: value for name, value in known.items() if name.startswith("dvdp.")}
        # Another setting may have trained what this one samples in its own way.
        own = {SETTING: job.run.setting, TURNING_POINTS: json.dumps(job.run.turning_points), PARAMS_DIGEST: digest}
        return {**kept, **own}
    return {
        TRAINING_HASH: job.training_hash,
        DATASET_DIGEST: job.dataset_digest,
        SETTING: job.run.setting,
        SEED: str(job.run.seed),
        TURNING_POINTS: json.dumps(job.run.turning_points),
        PARAMS_DIGEST: digest,
        DATASET: job.params.dataset.name,
        **({START: job.run.start.seen} if job.run.start else {}),
        **provenance(store=DataPaths.of(job.params).store),
    }


def model_file(job: Job) -> Path:
    """The trained model with the job's own way of sampling as its default."""
    trained = Run.from_description(_about(job)["run"])
    run = replace(trained, sampling=job.run.sampling, turning_points=job.run.turning_points)
    if run == trained:
        return job.weights
    path = job.folder / "models" / job.sampling_hash / job.weights.name
    about, weights = read_weights(job.weights)
    save_model(path, weights, {**about, **description(job), "run": run.describe()})
    return path


def _about(job: Job) -> dict[str, Any]:
    """What is stored with a job's weights, which stay on disk."""
    return tensors.read_about(job.weights, KIND, "model", "delete it and train again")


def model_name(params: Params) -> str:
    """Of the registered model."""
    return f"{params.tracking.model}-{params.dataset.name}"
