"""``dvdp promote``, ``rollback`` and ``reject``: which version of a registered model is to be used."""

from __future__ import annotations

from collections.abc import Callable

from mlflow import MlflowClient

from dvdp.config import Params
from dvdp.errors import UserError
from pipelines.tracking import champion
from pipelines.tracking.champion import Promotion
from pipelines.tracking.connection import reading, there_is_a_store
from pipelines.tracking.job_runs import model_name


def promote(params: Params, model: str, version: int | None) -> str:
    """Make a version champion, as a person wants it; without one, let the scores choose again.

    Returns:
        What became of it, for people.

    Raises:
        UserError: there is no such model or version, it was rejected, or MLflow does not answer.
    """

    def by_score(client: MlflowClient) -> Promotion:
        champion.release(client, model)
        # The highest score is one of this data set's.
        return champion.promote_best(client, model, params.tracking.max_score if model == model_name(params) else None)

    return _told(by_score if version is None else lambda client: champion.pin(client, model, version))


def rollback(model: str) -> str:
    """Make the former champion champion again; see :func:`promote`."""
    return _told(lambda client: champion.rollback(client, model))


def reject(model: str, version: int, reason: str) -> str:
    """Let a version never be promoted again; see :func:`promote`."""
    if not reason.strip():
        raise UserError("--reason: found nothing, expected why the version must not be used; say it in a few words.")
    return _told(lambda client: champion.reject(client, model, version, reason.strip()))


def _told(work: Callable[[MlflowClient], Promotion]) -> str:
    if not there_is_a_store():
        raise UserError(
            "MLflow: found no mlflow.db here and no server at MLFLOW_TRACKING_URI, expected one that holds the"
            " registered models; run `dvdp experiment` first, or name the server."
        )
    with reading("holds the registered models") as client:
        return work(client).text
