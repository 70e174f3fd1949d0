"""The connection to MLflow, and what happens while it is unavailable."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from dvdp.errors import UserError
from dvdp.files import locked


class TrackingUnavailable(RuntimeError):  # noqa: N818 - a state of affairs, not a mistake
    """MLflow could not be reached, or did not take something. Nothing is lost: see the text."""


@contextlib.contextmanager
def reaching(client: MlflowClient, folder: Path) -> Iterator[None]:
    """Raise :class:`TrackingUnavailable` for a server that does not answer; other errors stay as they are.

    Args:
        folder: where all that the block would log lies, for the text.
    """
    try:
        yield
    except Exception as error:
        if not _is_unavailable(error):
            raise
        raise _unavailable(client, folder, error) from error


def there_is_a_store() -> bool:
    """Whether there is an MLflow to read: an address, or ``mlflow.db`` here, which a reader must not create."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) or Path("mlflow.db").is_file()


@contextlib.contextmanager
def answering(what: str) -> Iterator[None]:
    """For a command that cannot do without MLflow's answer: raise UserError where :func:`reaching` finds none.

    Args:
        what: MLflow has that is read, e.g. "holds our scores".
    """
    try:
        yield
    except TrackingUnavailable:
        raise UserError(
            f"MLFLOW_TRACKING_URI: found no answer from MLflow there, which {what}, expected a server that runs; start"
            " it, or unset the variable to use mlflow.db here."
        ) from None


@contextlib.contextmanager
def reading(what: str) -> Iterator[MlflowClient]:
    """A client to read with; raises UserError as :func:`answering` does."""
    client = connect()
    with answering(what), reaching(client, Path()):
        yield client


def connect(project: Path | str = ".") -> MlflowClient:
    """A client of the store at ``MLFLOW_TRACKING_URI``, else of ``mlflow.db`` in the project folder.

    A server is not asked for anything yet, so it may be unavailable. A sqlite file is created where it is missing, by
    one process at a time, as MLflow cannot do that in several at once.

    Raises:
        UserError: MLFLOW_TRACKING_URI is of a kind that MLflow refuses.
    """
    address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(project).resolve() / 'mlflow.db'}"
    database = _sqlite_file(address)
    if database is None:
        if not re.match(r"[a-z+]+://", address) or address.startswith("file:"):
            raise UserError(
                f"MLFLOW_TRACKING_URI: found '{address}', expected the address of a server (http://...) or a"
                " database (sqlite:///...), as MLflow keeps no plain folders; unset it to use mlflow.db here."
            )
        return MlflowClient(address)
    database.parent.mkdir(parents=True, exist_ok=True)
    address = f"sqlite:///{database}"
    with locked(_lock_of(address)):
        return MlflowClient(address)


def _lock_of(address: str) -> Path:
    """One process of this machine (and user) at a time creates things in a store."""
    database = _sqlite_file(address)
    name = hashlib.sha256(address.encode()).hexdigest()[:16]
    shared = Path(tempfile.gettempdir()) / f"dvdp-{os.getuid()}-{name}.lock"
    return database.with_name(f"{database.name}.lock") if database else shared


def _sqlite_file(address: str) -> Path | None:
    return Path(address.removeprefix("sqlite:///")).resolve() if address.startswith("sqlite:///") else None


def _is_unavailable(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, requests.RequestException):
            return True
        if isinstance(error, MlflowException) and error.get_http_status_code() in (429, 500, 502, 503, 504):
            return True
        error = error.__cause__ or error.__context__
    return False


def _unavailable(client: MlflowClient, folder: Path, error: Exception) -> TrackingUnavailable:
    return TrackingUnavailable(
        f"tracking: MLflow at {_public(client.tracking_uri)} did not take everything ({_reason(error)}); it is all in"
        f" {folder}, and running the same command again replays it."
    )


def _reason(error: Exception) -> str:
    first = _public((str(error).splitlines() or [""])[0]) or type(error).__name__
    return first if len(first) <= 200 else f"{first[:200]}..."


def _public(text: str) -> str:
    """Without the name and password that an address may hold."""
    return re.sub(r"//[^/@\s]*@", "//", text)
