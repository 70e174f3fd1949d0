"""What can never work is one sentence before any work; what passes is no reason to stop."""

from __future__ import annotations

import contextlib
import http.server
import multiprocessing
import os
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from dvdp.config import parse_params
from dvdp.errors import UserError
from pipelines.jobs.job import Job, jobs
from pipelines.stages import prepare_data
from pipelines.tracking import connection
from pipelines.tracking.connection import TrackingUnavailable, connect, is_temporary, reaching, usable
from pipelines.tracking.job_runs import check_tracking, tracked
from pipelines.tracking.runs import SAMPLING_HASH
from pipelines.tracking.sync import LedgerSync
from tests.e2e.support import TINY
from tests.tracking.support import _empty_database, empty_store, free_port, write_ledger


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a prepared data set."""
    folder, before = tmp_path_factory.mktemp("data"), Path.cwd()
    os.chdir(folder)
    try:
        prepare_data(parse_params(TINY))
    finally:
        os.chdir(before)
    return folder / "data"


@pytest.fixture
def job(data: Path, tmp_path: Path) -> Job:
    (tmp_path / "data").symlink_to(data)
    return jobs(parse_params(TINY))[0]


@contextlib.contextmanager
def answering(status: int, body: bytes = b"", kind: str = "application/json") -> Iterator[str]:
    """The address of a server that gives this answer to everything."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def refused(address: str | None = None) -> str:
    """The sentence with which connecting ends, at once."""
    if address is not None:
        os.environ["MLFLOW_TRACKING_URI"] = address
    began = time.monotonic()
    try:
        with pytest.raises(UserError) as caught:
            connect()
    finally:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    assert time.monotonic() - began < 5
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    "address",
    ["mlruns", "/tmp/mlruns", "file:///tmp/mlruns", "localhost:5000", "http:/localhost:5000", "http://", "http://h:99999",
     "http://h:x", "http://[::1", "sqlite://", "sqlite://mlflow.db", "sqlite:///", "sqlite:mlflow.db"],
)  # fmt: skip
def test_an_address_that_is_none_is_named(address: str) -> None:
    assert refused(address).startswith(f"MLFLOW_TRACKING_URI: found '{address}', expected the address of a server")


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("foo://x", "unsupported URI 'foo://x'"),
        ("postgresql://me:secret@127.0.0.1:1/x", "No module named"),
        ("sqlite:////proc/mlflow.db", "unable to open database file"),
        ("sqlite:////proc/version/mlflow.db", "File exists"),
    ],
)
def test_an_address_that_cannot_work_says_why(address: str, told: str) -> None:
    said = refused(address)
    assert said.startswith("MLflow: found that it cannot be used at ")
    assert told in said
    assert "secret" not in said


def test_a_folder_in_place_of_the_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").mkdir()
    assert "unable to open database file" in refused()


def test_a_file_that_is_no_database_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database " * 1000)
    assert "(file is not a database), expected" in refused()
    assert (tmp_path / "mlflow.db").read_bytes() == b"no database " * 1000


@pytest.mark.parametrize("version", ["0a8213491aaa", "ffffffffffff"])
def test_a_database_of_another_release_says_what_to_do(tmp_path: Path, version: str) -> None:
    shutil.copyfile(_empty_database(), tmp_path / "mlflow.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = ?", [version])
        database.commit()
    said = refused()
    assert version in said
    assert "run `mlflow db upgrade`" in said
    assert "where a newer one did, install that" in said


def test_a_read_only_project_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def work() -> None:
        if os.getuid() == 0:  # whom no mode stops
            os.seteuid(65534)
        answers.put(refused())

    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(_empty_database(), Path(folder, "mlflow.db"))
        monkeypatch.chdir(folder)
        Path(folder).chmod(0o555)
        process = context.Process(target=work)
        process.start()
        process.join(60)
        Path(folder).chmod(0o755)
    assert "Permission denied" in answers.get(timeout=5)


def test_a_locked_database_is_waited_for_and_then_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty_store(tmp_path)
    real = sqlite3.connect
    monkeypatch.setattr(connection.sqlite3, "connect", lambda path, **options: real(path, **options | {"timeout": 0.1}))
    with contextlib.closing(real(tmp_path / "mlflow.db", isolation_level=None)) as busy:
        busy.execute("BEGIN EXCLUSIVE")
        with pytest.raises(TrackingUnavailable, match="running the same command again replays it") as caught:
            connect()
        assert caught.value.temporary
    connect()


# --- servers


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (401, b"You are not authenticated", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}', "set MLFLOW_TRACKING_USERNAME"),
        (404, b"<html>not found</html>", "correct its path"),
        (200, b"<html>hello</html>", "put that right"),
    ],
)
def test_a_server_that_refuses_stops_before_work(
    job: Job, monkeypatch: pytest.MonkeyPatch, status: int, body: bytes, told: str
) -> None:
    with answering(status, body, "text/html" if b"<" in body else "application/json") as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with pytest.raises(UserError, match=f"cannot be used at {address} .*{told}") as caught:
            check_tracking(job)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_server_in_trouble_is_no_reason_to_stop(job: Job, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    before = dict(os.environ)
    with answering(status, b"<html>later</html>", "text/html") as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        check_tracking(job)
    assert {**os.environ, "MLFLOW_TRACKING_URI": ""} == {**before, "MLFLOW_TRACKING_URI": ""}


def test_a_server_that_hangs_or_is_dead_is_no_reason_to_stop_and_found_soon(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.monotonic()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    check_tracking(job)
    assert time.monotonic() - began < 3


# --- names and experiments


def test_the_check_leaves_one_run_that_is_found_again(job: Job, tmp_path: Path) -> None:
    client = empty_store(tmp_path)
    check_tracking(job)
    check_tracking(job)
    experiment = client.get_experiment_by_name("dvdp")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.tags[SAMPLING_HASH] == job.sampling_hash
    assert tracked(job).run_id == run.info.run_id
    assert not job.folder.exists()


def test_a_deleted_experiment_stops_before_work_and_is_restored_as_the_sentence_says(job: Job, tmp_path: Path) -> None:
    client = empty_store(tmp_path)
    run = tracked(job)
    client.delete_experiment(run.experiment_id)
    with pytest.raises(UserError, match=r"^tracking.experiment: found 'dvdp' deleted in MLflow") as caught:
        check_tracking(job)
    command = f"MLFLOW_TRACKING_URI={client.tracking_uri} mlflow experiments restore --experiment-id"
    assert f"`{command} {run.experiment_id}`" in str(caught.value)
    client.restore_experiment(run.experiment_id)
    check_tracking(job)
    assert tracked(job).run_id == run.run_id


def test_artifacts_that_have_no_place_stop_before_work(job: Job, tmp_path: Path) -> None:
    empty_store(tmp_path)
    (tmp_path / "mlartifacts").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot be used at sqlite:///.*mlartifacts"):
        check_tracking(job)


# --- later


def test_what_goes_wrong_later_says_whether_the_same_command_helps(tmp_path: Path) -> None:
    client = empty_store(tmp_path)
    experiment = client.create_experiment("x")
    client.delete_experiment(experiment)
    with pytest.raises(TrackingUnavailable) as caught, reaching(client, Path("runs")):
        client.create_run(experiment)
    assert not is_temporary(caught.value)
    assert "it is all in runs: put that right, and then the same command replays it." in str(caught.value)
    assert "running the same command again" not in str(caught.value)


def test_a_store_that_disappears_is_told_without_waiting(tmp_path: Path) -> None:
    client = empty_store(tmp_path)
    experiment = client.create_experiment("x")
    client.delete_experiment(experiment)
    write_ledger(tmp_path, {100: 1.0})

    def find() -> None:
        client.create_run(experiment)

    sync = LedgerSync(client, tmp_path, find, 0.05).start()  # type: ignore[arg-type]
    began = time.monotonic()
    with pytest.raises(TrackingUnavailable) as caught:
        sync.close(timeout=60)
    assert time.monotonic() - began < 10
    assert not caught.value.temporary


def test_bugs_stay_bugs() -> None:
    with pytest.raises(TypeError), usable("http://x"):
        raise TypeError


def test_a_database_file_that_is_replaced_by_garbage_is_permanent(tmp_path: Path) -> None:
    client = MlflowClient(empty_store(tmp_path).tracking_uri)
    shutil.copyfile(__file__, tmp_path / "mlflow.db")
    with pytest.raises(TrackingUnavailable) as caught, reaching(client, tmp_path):
        client.search_experiments()
    assert not caught.value.temporary
