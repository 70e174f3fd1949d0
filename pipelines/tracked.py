"""A job's run in MLflow, and what leads back from it."""

from __future__ import annotations

import hashlib
import json

from dvdp.config import Params
from dvdp.data.store import ImageStore
from dvdp.identity import training_identity
from dvdp.models.export import load_model
from dvdp.training.loop import is_finished
from pipelines import tracking
from pipelines.places import Places
from pipelines.stages import Job


def tracked(job: Job) -> tracking.TrackedRun:
    """The job's run in MLflow, with all that is known before training.

    A run is one way of sampling from one training: what is trained once and sampled twice makes two.
    """
    params = job.params
    run = tracking.open_run(
        tracking.connect(), params.tracking.experiment, tracking.SAMPLING_HASH, job.sampling_hash, job.name
    )
    store = ImageStore(Places.of(params).store)
    run.log_params({**training_identity(job.run), "flip": params.dataset.flip})
    run.log_dataset(params.dataset.name, job.dataset_digest, store.images(range(min(16, len(store)))))
    run.set_tags(description(job))
    return run


def description(job: Job) -> dict[str, str]:
    """What leads back from a trained run to where it comes from: as it was when the run was trained."""
    if is_finished(job.folder):
        known = load_model(job.weights).description
        return {name: value for name, value in known.items() if name.startswith("dvdp.")}
    return {
        tracking.TRAINING_HASH: job.training_hash,
        tracking.DATASET_DIGEST: job.dataset_digest,
        tracking.SETTING: job.run.setting,
        tracking.SEED: str(job.run.seed),
        tracking.TURNING_POINTS: json.dumps(job.run.turning_points),
        tracking.PARAMS_DIGEST: hashlib.sha256(json.dumps(job.run.describe(), sort_keys=True).encode()).hexdigest(),
        "dvdp.dataset": job.params.dataset.name,
        **tracking.provenance(store=Places.of(job.params).store),
    }


def model_name(params: Params) -> str:
    """Of the registered model."""
    return f"{params.tracking.model}-{params.dataset.name}"
