"""Registered models by their address, and copies of their weights."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from dvdp.config import Params
from dvdp.errors import UserError
from dvdp.files import write_atomically
from pipelines.tracking import registry
from pipelines.tracking.champion import CHAMPION
from pipelines.tracking.connection import reading, there_is_a_store
from pipelines.tracking.job_runs import model_name


@contextlib.contextmanager
def looked_up(params: Params, address: str, option: str = "--model") -> Iterator[tuple[MlflowClient, ModelVersion]]:
    """A version of ours in MLflow, and a client to read it with.

    Args:
        address: ``models:/<name>@<alias>`` or ``models:/<name>/<version>``.
        option: that named it, for errors.

    Raises:
        UserError: there is no such version, it is none of ours, or MLflow does not answer.
    """
    parts = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", address)
    if parts is None:
        raise UserError(
            f"{option}: found '{address}', expected models:/<name>@<alias> or models:/<name>/<version>, such as"
            f" models:/{model_name(params)}@{CHAMPION}."
        )
    if not there_is_a_store():
        raise UserError(
            f"{option}: found '{address}' and no MLflow here, expected mlflow.db or a server at MLFLOW_TRACKING_URI;"
            " run `dvdp experiment` first, or name the server."
        )
    name, alias, number = parts.groups(default="")
    with reading("holds the registered models") as client:
        yield client, _version(client, name, alias, number, option)


def fetched(client: MlflowClient, params: Params, version: ModelVersion, address: str, option: str = "--model") -> Path:
    """A copy of a version's weights, made once.

    Args:
        address: that the version was looked up by.
        option: as in :func:`looked_up`.

    Raises:
        UserError: they are not where MLflow keeps them, or not those that were registered.
    """
    digest = version.tags[registry.WEIGHTS_DIGEST]
    weights = folder_of(params, digest) / "weights.safetensors"
    if not weights.is_file():
        with tempfile.TemporaryDirectory() as folder:
            try:
                copy = mlflow.artifacts.download_artifacts(
                    f"models:/{version.name}/{version.version}/artifacts/{weights.name}",
                    dst_path=folder,
                    tracking_uri=client.tracking_uri,
                    registry_uri=client.tracking_uri,
                )
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                raise UserError(
                    f"{option}: found no {weights.name} of '{address}' where MLflow keeps it, {version.source},"
                    " expected the weights that were registered; put them back, or name another version."
                ) from None
            if registry.weights_digest(*registry.read_weights(Path(copy))) != digest:
                raise UserError(
                    f"{option}: found other weights in '{address}' than its tag {registry.WEIGHTS_DIGEST} says,"
                    " expected those that were registered; name another version."
                )
            write_atomically(weights, Path(copy).read_bytes())
    return weights


def folder_of(params: Params, weights_digest: str) -> Path:
    """Where what is made of a registered model lies."""
    return params.cluster.storage / "models" / weights_digest[:12]


def _version(client: MlflowClient, name: str, alias: str, number: str, option: str) -> ModelVersion:
    found = f"models:/{name}@{alias}" if alias else f"models:/{name}/{number}"
    try:
        version = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise UserError(
            f"{option}: found no version '{found}' in MLflow, expected one that `dvdp experiment` has registered; look"
            " for its name and number on MLflow's page of models."
        ) from None
    if registry.WEIGHTS_DIGEST not in version.tags or not version.run_id or version.status != "READY":
        raise UserError(
            f"{option}: found '{found}', which is no finished version of ours, expected one that `dvdp experiment` has"
            " registered; name another."
        )
    return version
