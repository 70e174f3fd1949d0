"""What MLflow holds is exact, whatever happens on the way there."""

from __future__ import annotations

import json
import logging
import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import requests
from mlflow import MlflowClient
from PIL import Image

from dvdp.errors import UserError
from dvdp.training import ledger
from pipelines.provenance import DVC_HASH, GIT_COMMIT, provenance
from pipelines.tracking.connection import TrackingUnavailable, connect, reaching
from pipelines.tracking.runs import COMPARISON_HASH, TRAINING_HASH, TrackedRun, adopt, open_run
from pipelines.tracking.sync import LedgerSync
from pipelines.tracking.system import watch_machine
from tests.tracking.support import (
    empty_store,
    free_port,
    kill,
    mlflow_server,
    small_run,
    values,
    wait_until,
    write_ledger,
)

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def _no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def client(tmp_path: Path) -> MlflowClient:
    return empty_store(tmp_path)


def opened(client: MlflowClient, training_hash: str = "abc") -> TrackedRun:
    return open_run(client, "digits", TRAINING_HASH, training_hash, f"run {training_hash}")


def sync(client: MlflowClient, folder: Path, interval: float = 0.05) -> LedgerSync:
    return LedgerSync(client, folder, lambda: opened(client), interval)


def add_preview(folder: Path, images: int) -> None:
    (folder / "previews").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), (images % 256, 0, 0)).save(folder / "previews" / f"{images}.png")


def preview_steps(client: MlflowClient, run_id: str) -> list[int]:
    names = [a.path for a in client.list_artifacts(run_id, "images") if a.path.endswith(".png")]
    return sorted(int(name.split("+")[2]) for name in names)


# --- the store


def _connect_and_use(folder: str, answers: multiprocessing.Queue) -> None:
    answers.put(opened(connect(folder)).experiment_id)


@pytest.mark.slow
def test_a_fresh_database_opened_by_four_processes_at_once_works_in_all(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=_connect_and_use, args=(str(tmp_path), answers)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len({answers.get(timeout=5) for _ in range(4)}) == 1
    # All four took the same run.
    assert len(connect(tmp_path).search_runs(["1"])) == 1


def test_artifacts_lie_beside_the_database_wherever_one_stands(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    opened(client).log_text("note.txt", "hello")
    assert [p.read_text() for p in (tmp_path / "mlartifacts").rglob("note.txt")] == ["hello"]
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_environment_names_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert connect(tmp_path).tracking_uri == "http://127.0.0.1:9"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["file:///tmp/mlruns", "mlruns"])
def test_an_address_that_mlflow_refuses_is_one_sentence(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(UserError, match=rf"^MLFLOW_TRACKING_URI: found '{address}', expected the address"):
        connect()


def test_a_deleted_experiment_is_one_sentence(client: MlflowClient) -> None:
    client.delete_experiment(opened(client).experiment_id)
    with pytest.raises(UserError, match=r"tracking.experiment: found 'digits' deleted in MLflow"):
        opened(client)


# --- one run


def test_a_run_is_found_again_by_its_training_hash(client: MlflowClient) -> None:
    first, again, other = opened(client), opened(client), opened(client, "other")
    assert first == again
    assert other.run_id != first.run_id


def test_a_deleted_run_is_made_anew(client: MlflowClient) -> None:
    first = opened(client)
    client.delete_run(first.run_id)
    assert opened(client).run_id != first.run_id


def test_status_follows_the_work(client: MlflowClient) -> None:
    run = opened(client)
    for status in ("RUNNING", "FAILED", "RUNNING", "FINISHED"):
        run.set_status(status)
        assert client.get_run(run.run_id).info.status == status


def test_writing_everything_twice_leaves_it_once(client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    # MLflow's load_table asks the address of the environment, whatever client it is a method of.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    run = opened(client)
    figure = plt.figure()
    for _ in range(2):
        run.log_params(small_run().describe())
        run.set_tags({"dvdp.seed": "0"})
        run.log_dataset("digits", "f" * 64, np.zeros((2, 8, 8, 3), np.uint8))
        run.set_metrics({"fd_labels": 3.5, "undefined": float("nan")}, 1000)
        run.log_table("comparison.json", [{"setting": "ddpm", "score": 1.0}, {"setting": "dvdp", "speed": 2.0}])
        run.log_json("record.json", {"metrics": [1, 2]})
        run.log_image("samples/grid.png", Image.new("RGB", (8, 8)))
        run.log_figure("process.png", figure)
    plt.close(figure)

    state = client.get_run(run.run_id)
    assert state.data.params["turning_points"] == "[300]"
    assert state.data.params["training.precision"] == "fp32"
    assert values(client, run.run_id)["fd_labels"] == [(1000, 3.5)]
    assert len(values(client, run.run_id)["undefined"]) == 1
    (dataset,) = state.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("digits", "f" * 36)
    table = client.load_table(run.experiment_id, "comparison.json", [run.run_id])
    assert table["setting"].tolist() == ["ddpm", "dvdp"]
    assert json.loads(Path(client.download_artifacts(run.run_id, "record.json")).read_text()) == {"metrics": [1, 2]}


def test_a_new_score_at_the_same_step_is_the_newest_value(client: MlflowClient) -> None:
    run = opened(client)
    run.set_metrics({"fd": 3.0}, 10)
    time.sleep(0.002)
    run.set_metrics({"fd": 2.0}, 10)
    assert client.get_run(run.run_id).data.metrics["fd"] == 2.0


def test_a_param_that_differs_stays_with_a_warning(client: MlflowClient, caplog: pytest.LogCaptureFixture) -> None:
    run = opened(client)
    run.log_params({"model": {"model_channels": 8}})
    run.log_params({"model": {"model_channels": 16, "num_res_blocks": 1}})
    assert client.get_run(run.run_id).data.params == {"model.model_channels": "8", "model.num_res_blocks": "1"}
    assert "model.model_channels stays '8'" in caplog.text


def test_the_load_of_the_machine_is_logged_while_a_run_trains(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    run = opened(client)
    run.set_status("RUNNING")
    for _ in range(2):
        end = watch_machine(run)
        time.sleep(1)
        end()
    logged = values(client, run.run_id)["system/cpu_utilization_percentage"]
    assert [step for step, _ in logged] == list(range(len(logged)))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    watch_machine(run)()
    assert values(client, run.run_id)["system/cpu_utilization_percentage"] == logged


def test_a_comparison_nests_its_runs_and_links_to_them(client: MlflowClient) -> None:
    children = {name: opened(client, name) for name in ("ddpm", "dvdp")}
    for comparison in ("old", "new"):
        parent = open_run(client, "digits", COMPARISON_HASH, comparison, comparison)
        adopt(parent, children, summary="Best: dvdp", title=f"{comparison}: dvdp")
    nested = client.search_runs(["1"], f"tags.mlflow.parentRunId = '{parent.run_id}'")
    assert {run.info.run_id for run in nested} == {child.run_id for child in children.values()}
    old = open_run(client, "digits", COMPARISON_HASH, "old", "old")
    assert client.get_run(old.run_id).info.run_name == "old: dvdp"
    note = client.get_run(old.run_id).data.tags["mlflow.note.content"]
    assert note.startswith("Best: dvdp\n\n[Side by side](#/compare-runs?runs=%5B%22")
    assert all(f"/runs/{child.run_id})" in note for child in children.values())


def test_provenance_names_commit_and_lock_as_far_as_there_are_any(tmp_path: Path) -> None:
    store = Path("data/digits/store")
    assert provenance(tmp_path, store) == {}
    lock = "stages: {prepare: {outs: [{path: data/digits/store, md5: %s.dir}]}}\n"
    (tmp_path / "dvc.lock").write_text(lock % "abc")

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "reports").mkdir()
    for name in ("params.yaml", "reports/metrics.json"):
        (tmp_path / name).write_text("{}\n")
    git("add", ".")
    git("commit", "-m", "first")
    clean = provenance(tmp_path, store)
    assert len(clean[GIT_COMMIT]) == 40
    assert clean[DVC_HASH] == "abc.dir"
    assert DVC_HASH not in provenance(tmp_path, Path("data/other/store"))
    (tmp_path / "dvc.lock").write_text(lock % "def")
    (tmp_path / "reports" / "metrics.json").unlink()
    repeated = provenance(tmp_path, store)
    assert repeated[GIT_COMMIT] == clean[GIT_COMMIT], "as DVC does while a stage runs"
    assert repeated[DVC_HASH] == "def.dir"
    (tmp_path / "params.yaml").write_text("seeds: [1]\n")
    assert provenance(tmp_path, store)[GIT_COMMIT] == clean[GIT_COMMIT] + "-dirty"


# --- from the ledger to MLflow


def test_metrics_and_previews_are_carried_over_once(client: MlflowClient, tmp_path: Path) -> None:
    write_ledger(tmp_path, {100: 1.0, 200: float("nan")})
    add_preview(tmp_path, 100)
    for _ in range(2):  # The second is a driver that was started again.
        with sync(client, tmp_path):
            pass
    add_preview(tmp_path, 200)
    with sync(client, tmp_path):
        ledger.append(tmp_path / "metrics.jsonl", 300, {"loss": 0.25, "late": 7.0})
    run = opened(client)
    assert [step for step, _ in values(client, run.run_id)["loss"]] == [100, 200, 300]
    assert values(client, run.run_id)["late"] == [(300, 7.0)]
    assert preview_steps(client, run.run_id) == [100, 200]
    first = client.get_metric_history(run.run_id, "loss")[0]
    assert first.timestamp == 1000 * (1_700_000_000 + 100)


def test_what_is_written_while_it_runs_arrives_before_the_end(client: MlflowClient, tmp_path: Path) -> None:
    with sync(client, tmp_path):
        write_ledger(tmp_path, {100: 1.0})
        run = opened(client)
        wait_until(lambda: values(client, run.run_id).get("loss"), 20)


def test_a_half_written_line_waits_for_its_end(client: MlflowClient, tmp_path: Path) -> None:
    write_ledger(tmp_path, {100: 1.0})
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole + whole[:20])
    with sync(client, tmp_path):
        pass
    assert values(client, opened(client).run_id)["loss"] == [(100, 1.0)]


def test_a_resumed_training_adds_no_second_value(client: MlflowClient, tmp_path: Path) -> None:
    """It shortens the ledger and logs again, at another time and here even with other losses."""
    run = opened(client)
    with sync(client, tmp_path):
        write_ledger(tmp_path, {100: 1.0, 200: 0.9, 300: 0.8})
        wait_until(lambda: len(values(client, run.run_id).get("loss", [])) == 3, 20)
        ledger.truncate(tmp_path / "metrics.jsonl", 100)
        time.sleep(0.2)
        write_ledger(tmp_path, {100: 1.0, 200: 0.5, 300: 0.4, 400: 0.3}, start=1.8e9)
    assert values(client, run.run_id) == {
        "loss": [(100, 1.0), (200, 0.9), (300, 0.8), (400, 0.3)],
        "speed": [(100, 2.0), (200, 1.8), (300, 1.6), (400, 0.6)],
    }


class HalfDone(MlflowClient):
    """Now and then does what it is told and then says it failed, or fails before doing anything."""

    calls = 0

    def log_batch(self, *arguments, **keywords):
        self.calls += 1
        if self.calls % 4 == 1:
            raise requests.ConnectionError("before")
        super().log_batch(*arguments, **keywords)
        if self.calls % 4 == 3:
            raise requests.ConnectionError("after")


def test_a_call_that_half_happened_is_neither_lost_nor_doubled(
    client: MlflowClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    losses = {100 * i: 1 / i for i in range(1, 601)}
    with sync(HalfDone(client.tracking_uri), tmp_path):
        write_ledger(tmp_path, losses)
    run = opened(client)
    assert values(client, run.run_id)["loss"] == list(losses.items())
    assert values(client, run.run_id)["speed"] == [(step, 2 * loss) for step, loss in losses.items()]
    assert "MLflow did not take metrics (before); the run goes on" in caplog.text
    assert "MLflow is back" in caplog.text


def test_an_unavailable_server_is_reported_at_the_end_and_everything_stays_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    client = connect(tmp_path)
    write_ledger(tmp_path, {100: 1.0})
    carrier = sync(client, tmp_path).start()
    began = time.monotonic()
    with pytest.raises(
        TrackingUnavailable, match=rf"it is all in {tmp_path}, and running the same command again replays it"
    ):
        carrier.close(timeout=1)
    assert time.monotonic() - began < 15
    # Said once, however often it was tried.
    assert len([r for r in caplog.records if r.name == "dvdp.tracking" and r.levelno == logging.WARNING]) == 1


def test_an_error_of_the_training_is_not_hidden_by_one_of_tracking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ZeroDivisionError), sync(connect(tmp_path), tmp_path):
        raise ZeroDivisionError


def test_only_an_unavailable_server_becomes_tracking_unavailable(client: MlflowClient, tmp_path: Path) -> None:
    with pytest.raises(TrackingUnavailable), reaching(client, tmp_path):
        raise requests.ConnectionError("no route")
    with pytest.raises(ZeroDivisionError), reaching(client, tmp_path):
        raise ZeroDivisionError


def test_no_message_holds_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{free_port()}")
    client = connect(tmp_path)
    with pytest.raises(TrackingUnavailable, match=r"MLflow at http://127.0.0.1") as caught, reaching(client, tmp_path):
        opened(client)
    assert "secret" not in str(caught.value)


# --- faults, with real processes


def grow(folder: Path, steps: int, pause: float) -> threading.Thread:
    """A training that logs ``steps`` lines and a preview for every tenth."""

    def work() -> None:
        for i in range(1, steps + 1):
            ledger.append(folder / "metrics.jsonl", 100 * i, {"loss": 1 / i})
            if i % 10 == 0:
                add_preview(folder, 100 * i)
            time.sleep(pause)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_server_killed_and_started_again_in_between_holds_everything_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_store(tmp_path)
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    client = connect(tmp_path)
    steps = 200
    carrier = sync(client, tmp_path, interval=0.01).start()  # The server is not there yet.
    with mlflow_server(tmp_path, port):
        training = grow(tmp_path, steps, 0.1)
        wait_until(lambda: len(values(client, opened(client).run_id).get("loss", [])) > 20, 60)
    wait_until(lambda: not training.is_alive(), 60)
    with mlflow_server(tmp_path, port):
        carrier.close(timeout=60)
        run = opened(client)
        assert values(client, run.run_id)["loss"] == [(100 * i, 1 / i) for i in range(1, steps + 1)]
        assert sorted(set(preview_steps(client, run.run_id))) == list(range(1000, 100 * steps + 1, 1000))


DRIVER = """
import sys, time
from pathlib import Path
from pipelines.tracking.connection import connect
from pipelines.tracking.runs import TRAINING_HASH, open_run
from pipelines.tracking.sync import LedgerSync
folder = Path(sys.argv[1])
client = connect(folder)
find = lambda: open_run(client, "digits", TRAINING_HASH, "abc", "run abc")
with LedgerSync(client, folder, find, interval=0.01):
    (folder / "ready").touch()
    while not (folder / "finish").exists():
        time.sleep(0.05)
"""


@pytest.mark.slow
def test_a_driver_killed_and_started_again_leaves_one_value_a_step(client: MlflowClient, tmp_path: Path) -> None:
    steps = 600
    training = grow(tmp_path, steps, 0.05)
    for attempt in range(3):
        command = [sys.executable, "-c", DRIVER, str(tmp_path)]
        driver = subprocess.Popen(command, start_new_session=True)
        wait_until((tmp_path / "ready").exists, 120)
        (tmp_path / "ready").unlink()
        if attempt < 2:
            time.sleep(2 + 0.37 * attempt)
            kill(driver)
    training.join()
    (tmp_path / "finish").touch()
    assert driver.wait(120) == 0
    run = opened(client)
    assert values(client, run.run_id)["loss"] == [(100 * i, 1 / i) for i in range(1, steps + 1)]
    assert sorted(set(preview_steps(client, run.run_id))) == list(range(1000, 100 * steps + 1, 1000))
