"""Whatever ends an experiment, nothing of it lives on, and the next start ends what says that it does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipelines import left_behind
from pipelines.left_behind import MARK, end_orphans, running
from pipelines.tracking.connection import connect
from pipelines.tracking.runs import (
    FLOW_RUN,
    TRAINING_HASH,
    kill_runs_of,
    killed_when_interrupted,
    of_flow_run,
    open_run,
)
from tests.e2e.support import SOURCES, Project, sentence, wait_until, workers
from tests.tracking.support import empty_store
from tests.webhooks import listening

COMMAND = ("dvdp", "experiment", "--reports", "reports")

PARENT = """
import subprocess
from pipelines.left_behind import mark_children
mark_children()
print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
input()
"""


def children_of(folder: Path) -> list[psutil.Process]:
    """What commands in a folder have started and still lives."""
    found = []
    for process in psutil.process_iter(["environ", "status"]):
        mark = (process.info["environ"] or {}).get(MARK, "")
        if mark.endswith(f" {folder}") and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def test_orphans_of_this_folder_end_and_children_of_living_commands_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {name: tmp_path / name for name in ("dead", "alive", "elsewhere")}
    parents, children = {}, {}
    for name, folder in folders.items():
        folder.mkdir()
        here = folders["dead"] if name == "alive" else folder
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        parents[name] = subprocess.Popen([sys.executable, "-c", PARENT], cwd=here, text=True, **pipes)  # type: ignore
        assert parents[name].stdout is not None
        children[name] = psutil.Process(int(parents[name].stdout.readline()))
    try:
        for name in ("dead", "elsewhere"):
            parents[name].kill()
            parents[name].wait()
        monkeypatch.chdir(folders["dead"])
        end_orphans()
        psutil.wait_procs([children["dead"]], timeout=5)
        assert children_of(folders["dead"]) == [children["alive"]]
        assert children["elsewhere"].is_running()
    finally:
        for process in (*parents.values(), *children.values()):
            with contextlib.suppress(psutil.Error):
                process.kill()
        for parent in parents.values():
            parent.wait()


def test_runs_of_a_dead_flow_run_are_killed_in_mlflow_and_no_others(tmp_path: Path) -> None:
    client = empty_store(tmp_path)
    runs = {}
    for flow in ("dead", "alive"):
        with of_flow_run(flow):
            runs[flow] = open_run(client, "digits", TRAINING_HASH, flow, flow)
            runs[f"{flow} and finished"] = open_run(client, "digits", TRAINING_HASH, f"{flow}2", flow)
            runs[f"{flow} and finished"].set_status("FINISHED")
    with of_flow_run("later"):
        again = open_run(client, "digits", TRAINING_HASH, "dead2", "dead")
        again.set_status("RUNNING")
    kill_runs_of(client, "dead")
    states = {name: client.get_run(run.run_id).info.status for name, run in runs.items()}
    assert states == {
        "dead": "KILLED", "alive": "RUNNING", "dead and finished": "RUNNING", "alive and finished": "FINISHED",
    }  # fmt: skip
    assert client.get_run(again.run_id).data.tags[FLOW_RUN] == "later"


def test_runs_of_an_interrupted_flow_run_are_killed_and_do_not_fail_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = empty_store(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    with of_flow_run("one"):
        runs = {name: open_run(client, "digits", TRAINING_HASH, name, name) for name in ("at work", "ready", "waiting")}
        runs["ready"].set_status("FINISHED")
        client.update_run(runs["waiting"].run_id, status="SCHEDULED")
        with pytest.raises(KeyboardInterrupt), killed_when_interrupted():
            raise KeyboardInterrupt
        # What a thread says of it whose workers are gone.
        runs["at work"].set_status("FAILED")
        runs["at work"].set_status("RUNNING")
    states = {name: client.get_run(run.run_id).info.status for name, run in runs.items()}
    assert states == {"at work": "KILLED", "ready": "FINISHED", "waiting": "SCHEDULED"}
    with of_flow_run("two"):
        runs["at work"].set_status("RUNNING")
        with pytest.raises(ValueError, match="x"), killed_when_interrupted():
            raise ValueError("x")
    assert client.get_run(runs["at work"].run_id).info.status == "RUNNING"


def test_the_lock_of_a_flow_run_is_there_while_it_lasts_and_after_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with running("one"):
        assert [file.name for file in left_behind.RUNNING.iterdir()] == ["one.lock"]
    with pytest.raises(ValueError, match="x"), running("two"):
        raise ValueError("x")
    assert not list(left_behind.RUNNING.iterdir())
    with pytest.raises(KeyboardInterrupt), running("three"):
        raise KeyboardInterrupt
    assert [file.name for file in left_behind.RUNNING.iterdir()] == ["three.lock"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_told_to_end_says_so_in_one_sentence(number: signal.Signals, tmp_path: Path) -> None:
    """A command that waits for a lock, with a child."""
    script = (
        "import subprocess, sys, time\nfrom pipelines import cli\n"
        "def wait(*_, **__):\n    print(subprocess.Popen(['sleep', '60']).pid, flush=True)\n    time.sleep(60)\n"
        "cli._read = wait\nsys.exit(cli.main(['check']))"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, text=True, **pipes)  # type: ignore
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert sentence(said).startswith("interrupted; what is finished is kept")
    assert len(said.splitlines()) == 1
    assert not child.is_running()


# --- real servers

FLOW = """
import sys, time
from prefect import flow, task
from prefect.runtime import flow_run
from pipelines.left_behind import end_dead_runs, end_orphans, mark_children, running
from pipelines.tracking.connection import connect
from pipelines.tracking.runs import TRAINING_HASH, open_run

@task
def step(seconds):
    open("at_work", "w").close()
    time.sleep(seconds)

@flow
def work(name, seconds):
    with running(flow_run.id):
        end_dead_runs()
        run = open_run(connect(), "dvdp", TRAINING_HASH, name, name)
        step(float(seconds))
        run.set_status("FINISHED")

end_orphans()
mark_children()
work(*sys.argv[1:])
"""


def prefect_states(project: Project, kind: str = "flow_run") -> Counter[str]:
    """How many flow runs, or task runs, are in which state."""
    with contextlib.closing(sqlite3.connect(project.folder / ".services" / "prefect" / "prefect.db")) as database:
        return Counter(state for (state,) in database.execute(f"SELECT state_type FROM {kind}"))


def mlflow_states(project: Project) -> dict[str, str]:
    """The state of each run, by name."""
    client = connect(project.folder)
    everywhere = [experiment.experiment_id for experiment in client.search_experiments()]
    return {run.info.run_name: run.info.status for run in client.search_runs(everywhere)}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_start_after_a_kill_ends_what_was_left_behind(tmp_path: Path) -> None:
    here = Project(tmp_path)
    (tmp_path / ".services" / "prefect").mkdir(parents=True)
    empty_store(tmp_path)
    sources = {"PYTHONPATH": str(SOURCES), "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120"}
    process = here.start(sys.executable, "-c", FLOW, "one", "300", **sources)
    try:
        wait_until((tmp_path / "at_work").exists, process)
        wait_until(lambda: prefect_states(here, "task_run") == {"RUNNING": 1}, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert prefect_states(here) == {"RUNNING": 1}
        assert mlflow_states(here) == {"one": "RUNNING"}
        assert children_of(tmp_path), "Prefect's temporary server lives on"

        with listening() as (address, told):
            here.run(sys.executable, "-c", FLOW, "two", "0", **sources, DVDP_WEBHOOK=address)
        assert [json.loads(body)["state"] for _, body in told] == ["CRASHED"]
        assert prefect_states(here) == {"CRASHED": 1, "COMPLETED": 1}
        assert prefect_states(here, "task_run") == {"CRASHED": 1, "COMPLETED": 1}
        assert mlflow_states(here) == {"one": "KILLED", "two": "FINISHED"}
        assert not children_of(tmp_path)
        assert not list((tmp_path / left_behind.RUNNING).iterdir())
    finally:
        for child in children_of(tmp_path):
            child.kill()


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_experiment_told_to_end_leaves_no_process(project: Callable[..., Project], number: signal.Signals) -> None:
    here = project(training={"images": 96000})
    process = here.start(*COMMAND)
    wait_until(lambda: workers(process), process)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    printed = here.finish(process, status=128 + number)
    assert sentence(printed).startswith("interrupted; what is finished is kept")
    assert "Traceback" not in printed
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive
    assert not children_of(here.folder)
    states = mlflow_states(here)
    assert "KILLED" in states.values()
    assert not {"RUNNING", "FAILED"} & set(states.values()), states
