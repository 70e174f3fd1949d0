"""The connection to MLflow, and what happens while it is unavailable or where it can never work."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import mlflow.store.db.utils
import requests
from mlflow import MlflowClient
from mlflow.exceptions import InvalidUrlException, MlflowException, RestException
from sqlalchemy.exc import DBAPIError

from dvdp.errors import UserError
from dvdp.files import locked
from pipelines.addresses import public

# A database that does not answer is asked three times rather than ten, which takes 100 s; its errors are ours to tell.
mlflow.store.db.utils.MAX_RETRY_COUNT = 3
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

#: Errors that are bugs of ours, not states of MLflow.
_BUGS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, TypeError)
#: What requests refuses before or after any server could answer.
_WRONG_ADDRESS = (
    InvalidUrlException,
    requests.exceptions.InvalidSchema,
    requests.exceptions.InvalidURL,
    requests.exceptions.MissingSchema,
    requests.exceptions.SSLError,
    requests.exceptions.TooManyRedirects,
)
#: What databases say of troubles that pass.
_PASSING = re.compile(
    "locked|refused|timed? ?out|could not (connect|receive|translate)|can't connect|lost connection|gone away|closed"
    "|reset|starting up|shutting down|too many",
    re.IGNORECASE,
)


class TrackingUnavailable(RuntimeError):  # noqa: N818 - a state of affairs, not a mistake
    """MLflow could not be reached, or did not take something. Nothing is lost: see the text."""

    def __init__(self, text: str, temporary: bool = True) -> None:
        super().__init__(text)
        self.temporary = temporary
        """Whether it may work the next time with nothing changed."""


class NoAnswer(UserError):  # noqa: N818 - as above
    """A command needs what MLflow holds, and it does not answer now."""


@contextlib.contextmanager
def reaching(client: MlflowClient, folder: Path) -> Iterator[None]:
    """Raise :class:`TrackingUnavailable` for whatever MLflow does not take; UserError and bugs stay as they are.

    Args:
        folder: where all that the block would log lies, for the text.
    """
    try:
        yield
    except (TrackingUnavailable, UserError, *_BUGS):
        raise
    except Exception as error:
        raise unavailable(client.tracking_uri, folder, error) from error


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
    except TrackingUnavailable as error:
        cause = error.__cause__
        if isinstance(cause, Exception) and not error.temporary:
            raise UserError(
                f"MLflow: found that it cannot be read ({_reason(cause)}), expected a store which {what};"
                f" {_remedy(cause)}."
            ) from None
        raise NoAnswer(
            f"MLFLOW_TRACKING_URI: found no answer from MLflow there, which {what}, expected a server that runs; start"
            " it, or unset the variable to use mlflow.db here."
        ) from None


@contextlib.contextmanager
def reading(what: str) -> Iterator[MlflowClient]:
    """A client to read with; raises UserError as :func:`answering` does."""
    with answering(what):
        client = connect()
        with usable(client.tracking_uri):
            yield client


def connect(project: Path | str = ".") -> MlflowClient:
    """A client of the store at ``MLFLOW_TRACKING_URI``, else of ``mlflow.db`` in the project folder.

    A server is not asked for anything yet, so it may be unavailable. A sqlite file is created where it is missing, by
    one process at a time, as MLflow cannot do that in several at once.

    Raises:
        UserError: the address or the database there can never work.
        TrackingUnavailable: the database does not answer, or is locked.
    """
    address = tracking_address(project)
    _check_address(address)
    database = sqlite_file(address)
    with usable(address):
        if database is None:
            return MlflowClient(address)
        database.parent.mkdir(parents=True, exist_ok=True)
        # MLflow would try for minutes what can never be opened, and its lock for ever.
        with contextlib.closing(sqlite3.connect(database, timeout=20, isolation_level=None)) as there:
            there.execute("BEGIN IMMEDIATE")
        address = f"sqlite:///{database}"
        with locked(lock_of(address)):
            return MlflowClient(address)


def tracking_address(project: Path | str = ".") -> str:
    """Where :func:`connect` leads."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(project).resolve() / 'mlflow.db'}"


@contextlib.contextmanager
def usable(address: str) -> Iterator[None]:
    """Raise UserError for what can never work, and :class:`TrackingUnavailable` for what may work later."""
    try:
        yield
    except (TrackingUnavailable, UserError, *_BUGS):
        raise
    except Exception as error:
        if is_temporary(error):
            raise unavailable(address, Path(), error) from error
        raise UserError(
            f"MLflow: found that it cannot be used at {public(address)} ({_reason(error)}), expected a server or a"
            f" database that takes runs; {_remedy(error)}, or name another with MLFLOW_TRACKING_URI."
        ) from error


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Let calls of MLflow fail within seconds while the block runs."""
    ours = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    before = {name: os.environ[name] for name in ours if name in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
        os.environ.update(before)


def find_or_create(
    client: MlflowClient, find: Callable[[], str | None], create: Callable[[], str], delete: Callable[[str], object]
) -> str:
    """The identifier of what there is, or else of what is created: one operation for all processes of this machine.

    A process of another machine may create the same at once: both look again and take what ``find`` puts first, and
    whose it is not deletes its own.
    """
    with locked(lock_of(client.tracking_uri)):
        found = find()
        if found is None:
            made = create()
            found = find() or made
            if found != made:
                delete(made)
    return found


def lock_of(address: str) -> Path:
    """One process of this machine (and user) at a time creates things in a store."""
    database = sqlite_file(address)
    name = hashlib.sha256(address.encode()).hexdigest()[:16]
    shared = Path(tempfile.gettempdir()) / f"dvdp-{os.getuid()}-{name}.lock"
    return database.with_name(f"{database.name}.lock") if database else shared


def _check_address(address: str) -> None:
    try:
        parts = urlsplit(address)
        whole = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port or an IPv6 address that is none
        whole = False
    scheme = re.match("[a-z0-9+.-]+(?=://)", address, re.IGNORECASE)
    kind = scheme[0].lower() if scheme else "file"
    wrong = not whole if kind in ("http", "https") else kind == "sqlite" and not address.startswith("sqlite:///")
    if wrong or kind == "file" or address == "sqlite:///":
        raise UserError(
            f"MLFLOW_TRACKING_URI: found '{public(address)}', expected the address of a server (http://...) or a"
            " database (sqlite:///...), as MLflow keeps no plain folders; unset it to use mlflow.db here."
        )


def sqlite_file(address: str) -> Path | None:
    return Path(address.removeprefix("sqlite:///")).resolve() if address.startswith("sqlite:///") else None


def is_temporary(error: BaseException) -> bool:
    """Whether the same call may succeed later with nothing changed: a dead or busy server, a locked database."""
    if isinstance(error, TrackingUnavailable):
        return error.temporary
    chain = list(_chain(error))
    for one in chain:
        if isinstance(one, _WRONG_ADDRESS):
            return False
        if isinstance(one, (DBAPIError, sqlite3.Error)):
            return bool(_PASSING.search(str(one)))
    if any(isinstance(one, (requests.RequestException, ConnectionError, TimeoutError)) for one in chain):
        return True
    answered = [one for one in chain if isinstance(one, MlflowException)]
    # MLflow's client gives its own refusals the code of an internal error.
    ours = ("INTERNAL_ERROR", "INVALID_STATE", "DATA_LOSS")
    return any(
        one.get_http_status_code() in (429, 500, 502, 503, 504)
        and (isinstance(one, RestException) or one.error_code not in ours)
        for one in answered
    )


def unavailable(address: str, folder: Path, error: Exception) -> TrackingUnavailable:
    """What to say of an error, and whether the same command alone helps."""
    where, start = f"it is all in {folder}", f"tracking: MLflow at {public(address)} did not take everything"
    if is_temporary(error):
        text = f"{start} ({_reason(error)}); {where}, and running the same command again replays it."
        return TrackingUnavailable(text)
    if isinstance(error, UserError):
        text = f"{str(error).rstrip('.')}; {where}, to be replayed by the same command after that."
    else:
        text = f"{start} ({_reason(error)}); {where}: {_remedy(error)}, and then the same command replays it."
    return TrackingUnavailable(text, temporary=False)


def _remedy(error: Exception) -> str:
    text = " ".join(map(str, _chain(error)))
    codes = {one.get_http_status_code() for one in _chain(error) if isinstance(one, MlflowException)}
    if "database schema" in text or "Can't locate revision" in text:
        return (
            f"where an older MLflow than {mlflow.__version__} wrote it, back it up and run `mlflow db upgrade` with the"
            " address; where a newer one did, install that"
        )
    if isinstance(error, ModuleNotFoundError):
        return "install what it names"
    if "not a database" in text or "malformed" in text:
        return "restore the file from a copy, or move it away to start a new one"
    if codes & {401, 403}:
        return "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, of who may write"
    if 404 in codes:
        return "correct its path"
    return "put that right"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: Exception) -> str:
    first = public((str(error).splitlines() or [""])[0]) or type(error).__name__
    return first if len(first) <= 200 else f"{first[:200]}..."
