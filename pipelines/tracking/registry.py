"""Trained runs as versions of a registered model; :mod:`pipelines.tracking.champion` says which of them to use.

A version holds what sampling needs and nothing else: the weights with their configuration (one safetensors file), the
few lines of ``model_code.py``, and the source of ``dvdp`` (``code_paths``), so that it loads where the core's
dependencies and mlflow are installed and ``dvdp`` is not. Where ``dvdp`` is imported already, that one runs.

Its tags are few, those that people look for; what else leads back to its origin is in its run and in MLmodel.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pyfunc
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.entities.logged_model_status import LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import AnyType
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS
from torch import Tensor

import dvdp
from dvdp import tensors
from dvdp.config import Run, SamplingParams
from dvdp.errors import UserError
from dvdp.evaluation.records import ScoreRecord
from dvdp.models.export import KIND
from pipelines.provenance import GIT_COMMIT
from pipelines.tracking.connection import find_or_create
from pipelines.tracking.runs import (
    DATASET,
    DATASET_DIGEST,
    SEED,
    SETTING,
    TRAINING_HASH,
    TURNING_POINTS,
    TrackedRun,
)

WEIGHTS_DIGEST = "dvdp.weights_digest"
#: The score that versions are ranked by, with its name, and the whole record as JSON.
SCORE = "dvdp.score"
SCORE_RECORD = "dvdp.score_record"

#: What is known of a run that is a tag of its version too.
_TAGS = (DATASET, SETTING, SEED, TURNING_POINTS, GIT_COMMIT, TRAINING_HASH, DATASET_DIGEST)

SIGNATURE = ModelSignature(
    inputs=Schema(
        [
            ColSpec(DataType.long, "count"),
            *(ColSpec(DataType.long, name, required=False) for name in ("seed", "first", "steps")),
            *(
                ColSpec(DataType.string, name, required=False)
                for name in ("label", "format", "solver", "image", "mask")
            ),
            # Rows that leave a number out make floats of the others, which a column of whole numbers would refuse.
            *(
                ColSpec(AnyType(), name, required=False)
                for name in ("guidance", "upscale", "strength", "colourise", "resampling")
            ),
        ]
    ),
    outputs=Schema(
        [
            ColSpec(AnyType(), "image"),
            *(ColSpec(DataType.long, name) for name in ("seed", "index")),
            ColSpec(DataType.string, "label", required=False),
        ]
    ),
)


def register(
    run: TrackedRun, name: str, weights: Path, tags: Mapping[str, str], record: ScoreRecord | None = None, step: int = 0
) -> ModelVersion:
    """Make a trained run a version of the registered model ``name``; a run that is one already stays that one.

    Args:
        name: ``<tracking.model>-<dataset.name>``.
        weights: the run's ``weights.safetensors``.
        tags: where it comes from: ``TRAINING_HASH`` (required) and what else :mod:`pipelines.tracking` names. MLmodel
            has all of them, the version a few.
        record: its scores; newer ones take the place of older ones.
        step: images seen in training.

    Returns:
        The version, found or created.

    Raises:
        UserError: the weights are missing, or are none of ours.
    """
    client = run.client
    about, state = read_weights(weights)
    digest = weights_digest(about, state)
    origin, tags = tags, {**{key: tags[key] for key in _TAGS if key in tags}, WEIGHTS_DIGEST: digest}
    if record is not None:
        tags |= _score_tags(record)
    create_registered_model(client, name)

    def find() -> str | None:
        return _find_version(client, name, tags[TRAINING_HASH], digest)

    number = find()
    if number is None:
        model = _logged_model(run, weights, Run.from_description(about["run"]).sampling, tags, origin, step)

        def create() -> str:
            return _create_version(run, name, model, tags)

        number = find_or_create(client, find, create, lambda made: client.delete_model_version(name, made))
    found = client.get_model_version(name, number)
    for key, value in tags.items():
        if found.tags.get(key) != value:
            client.set_model_version_tag(name, number, key, value)
    return client.get_model_version(name, number)


def set_card(client: MlflowClient, version: ModelVersion, text: str) -> None:
    """Let a version's description be its card."""
    if version.description != text:
        client.update_model_version(version.name, str(version.version), text)


def create_registered_model(client: MlflowClient, name: str) -> None:
    """Versions need one; where it is there already, nothing changes."""
    try:
        client.create_registered_model(name, description="Draws images; input: count, seed, solver, steps, label.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def requirements() -> list[str]:
    """What a model needs: ``dvdp``'s own dependencies without extras, and this mlflow."""
    needed = importlib.metadata.requires("dvdp") or []
    return [*(line for line in needed if "extra ==" not in line), f"mlflow=={mlflow.__version__}"]


def _score_tags(record: ScoreRecord) -> dict[str, str]:
    text = json.dumps(dataclasses.asdict(record), sort_keys=True)
    return {SCORE: f"{record.headline} {record.metrics[record.headline]:.6g}", SCORE_RECORD: text}


def score_of(version: ModelVersion) -> ScoreRecord | None:
    """The version's scores; None without a number to rank it by, or where another release of dvdp wrote them."""
    try:
        record = ScoreRecord.from_json(version.tags.get(SCORE_RECORD, ""))
    except UserError:
        return None
    return record if math.isfinite(record.metrics[record.headline]) else None


def ready_versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    found: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
        # A version whose creation was cut short is none.
        found += [version for version in page if version.status == "READY"]
        token = page.token
        if not token:
            return found


def _find_version(client: MlflowClient, name: str, training_hash: str, digest: str) -> str | None:
    """The number of the first version of a training with these weights."""
    wanted = {TRAINING_HASH: training_hash, WEIGHTS_DIGEST: digest}.items()
    numbers = [int(version.version) for version in ready_versions(client, name) if wanted <= version.tags.items()]
    return str(min(numbers)) if numbers else None


def _logged_model(
    run: TrackedRun,
    weights: Path,
    defaults: SamplingParams,
    tags: Mapping[str, str],
    origin: Mapping[str, str],
    step: int,
) -> LoggedModel:
    """The run's model in MLflow: found, completed where uploading was cut short, or created."""
    client = run.client
    query = f"source_run_id = '{run.run_id}' AND tags.`{WEIGHTS_DIGEST}` = '{tags[WEIGHTS_DIGEST]}'"
    order = [{"field_name": "creation_timestamp", "ascending": True}]

    def find() -> str | None:
        found = client.search_logged_models([run.experiment_id], query, max_results=1, order_by=order)
        return str(found[0].model_id) if found else None

    def create() -> str:
        made = client.create_logged_model(
            run.experiment_id, name="dvdp", source_run_id=run.run_id, tags=dict(tags), model_type="image generation"
        )
        return str(made.model_id)

    model = client.get_logged_model(find_or_create(client, find, create, client.delete_logged_model))
    known = client.get_run(run.run_id).outputs
    if model.model_id not in [output.model_id for output in (known.model_outputs if known else [])]:
        client.log_outputs(run.run_id, [LoggedModelOutput(model.model_id, step)])
    if model.status == LoggedModelStatus.READY:
        return model
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        mlflow.pyfunc.save_model(
            str(path),
            python_model=str(Path(__file__).with_name("model_code.py")),
            artifacts={"weights": str(weights.resolve())},
            code_paths=[str(Path(dvdp.__file__).parent)],
            pip_requirements=requirements(),
            signature=SIGNATURE,
            input_example=pd.DataFrame([{"count": 4, "seed": 0, "solver": defaults.solver, "steps": defaults.steps}]),
            mlflow_model=Model(
                model_uuid=model.model_id,
                model_id=model.model_id,
                run_id=run.run_id,
                metadata={**origin, **tags},
            ),
        )
        # MLflow notes where the files were on this machine; it reads their copies in the model.
        saved = Model.load(str(path))
        flavor = saved.flavors["python_function"]
        flavor["model_code_path"] = Path(flavor["model_code_path"]).name
        for artifact in flavor["artifacts"].values():
            artifact["uri"] = artifact["path"]
        saved.save(str(path / "MLmodel"))
        client.log_model_artifacts(model.model_id, str(path))
    return client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def _create_version(run: TrackedRun, name: str, model: LoggedModel, tags: Mapping[str, str]) -> str:
    client = run.client
    version = client.create_model_version(
        name, model.artifact_location, run.run_id, tags=dict(tags), model_id=model.model_id
    )
    # How MLflow's page of the logged model finds its versions.
    link = json.dumps([{"name": name, "version": version.version}])
    client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: link})
    return str(version.version)


def read_weights(weights: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is stored with the weights of a run, and the weights; no network is built.

    Raises:
        UserError: the file is missing, damaged or none of ours.
    """
    if not weights.is_file():
        raise UserError(f"model: found no file '{weights}', expected the weights.safetensors of a finished run.")
    return tensors.read(weights, KIND, "model", "give the weights.safetensors of a finished run")


def weights_digest(about: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """Of the tensors, and of the default way of sampling: what is trained once may be sampled in several."""
    run = Run.from_description(about["run"])
    sampling, points = run.sampling, {"turning_points": run.turning_points} if run.at_all_timesteps else {}
    options = {**sampling.options(), "lift": sampling.lift, **points}
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
