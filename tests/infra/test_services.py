"""The team's services come up together, are found, and go away without taking anything else with them."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import services
from pipelines.addresses import services_environment
from tests.tracking.support import free_port, wait_until

PROJECT = Path(__file__).parents[2]


def alive(pid: int) -> bool:
    return services._start_time(pid) is not None


def recorded(project: Path, name: str, pid: int, started: int | None) -> None:
    folder = project / ".services"
    folder.mkdir(exist_ok=True)
    record = {"pid": pid, "started": started, "boot": services._boot(), "mark": f"{name}-feed", "port": None}
    (folder / f"{name}.json").write_text(json.dumps(record))


@contextlib.contextmanager
def answering(status: int) -> Iterator[int]:
    """An HTTP server that gives this answer to everything; yields its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_environment_holds_only_what_answers_now(tmp_path: Path) -> None:
    assert services_environment(tmp_path) == {}
    (tmp_path / ".services").mkdir()
    with answering(200) as well, answering(503) as ill:
        lines = (
            f"export MLFLOW_TRACKING_URI=http://127.0.0.1:{well}\nexport PREFECT_API_URL=http://127.0.0.1:{ill}/api\n"
        )
        (tmp_path / ".services" / "env").write_text(lines)
        assert services_environment(tmp_path) == {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{well}"}
    assert services_environment(tmp_path) == {}


def test_looking_for_services_that_hang_takes_less_than_a_second(tmp_path: Path) -> None:
    (tmp_path / ".services").mkdir()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        lines = (
            f"export MLFLOW_TRACKING_URI=http://127.0.0.1:{port}\nexport PREFECT_API_URL=http://127.0.0.1:{port}/api\n"
        )
        (tmp_path / ".services" / "env").write_text(lines)
        began = time.monotonic()
        assert services_environment(tmp_path) == {}
        assert time.monotonic() - began < 1.5


def test_a_taken_port_is_one_sentence_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(200) as port:
        arguments = ["up", "--project", str(tmp_path), "--mlflow-port", str(free_port()), "--prefect-port", str(port)]
        assert services.main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"services: found port {port} taken by another program, expected it free for prefect")
    assert len(printed.err.strip().splitlines()) == 1
    assert not list((tmp_path / ".services").glob("*.json"))


def test_down_without_services_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert services.main(["down", "--project", str(tmp_path)]) == 0
    assert "none were started" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_process_that_only_got_the_same_number_is_left_alone(tmp_path: Path) -> None:
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        recorded(tmp_path, "mlflow", stranger.pid, (services._start_time(stranger.pid) or 0) - 100)
        services.down(tmp_path)
        assert stranger.poll() is None
        assert not (tmp_path / ".services" / "mlflow.json").exists()
    finally:
        stranger.kill()
        stranger.wait()


def test_down_ends_what_a_service_left_behind_in_sessions_of_their_own(tmp_path: Path) -> None:
    """Flows of a worker are such processes; one here ignores the polite request, and the worker is dead already."""
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", stubborn],
        env={**os.environ, services.MARK: "worker-feed"},
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()
    recorded(tmp_path, "worker", child.pid, 1)  # The leader: long gone, its number taken by the child.
    reaper = threading.Thread(target=child.wait)
    reaper.start()
    limit = services.END_LIMIT
    services.END_LIMIT = 1
    try:
        services.down(tmp_path)
    finally:
        services.END_LIMIT = limit
    reaper.join(10)
    assert child.returncode == -signal.SIGKILL


FLOW = """
import os, time
from pathlib import Path
from prefect import flow

@flow
def long():
    Path("flow.json").write_text('{"pid": %d, "mlflow": "%s"}' % (os.getpid(), os.environ["MLFLOW_TRACKING_URI"]))
    time.sleep(600)
"""
DEPLOY = """
import sys
from prefect import flow
from prefect.deployments import run_deployment
long = flow.from_source(source=sys.argv[1], entrypoint="flows.py:long")
long.deploy(name="test", work_pool_name="dvdp", build=False, push=False, print_next_steps=False)
run_deployment("long/test", timeout=0)
"""


@pytest.mark.slow
def test_services_come_up_run_flows_and_end(tmp_path: Path) -> None:
    ports = ["--mlflow-port", str(free_port()), "--prefect-port", str(free_port())]

    def command(*arguments: str) -> str:
        line = [sys.executable, "-m", "infra.services", *arguments, "--project", str(tmp_path)]
        done = subprocess.run(line, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=500)
        assert done.returncode == 0, done.stderr
        return done.stdout

    try:
        printed = command("up", *ports)
        assert printed.count(": ready after") == 3
        addresses = services_environment(tmp_path, timeout=10)
        assert addresses == {
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{ports[1]}",
            "PREFECT_API_URL": f"http://127.0.0.1:{ports[3]}/api",
        }
        assert command("up").count(": already running") == 3
        assert f"export PREFECT_API_URL={addresses['PREFECT_API_URL']}\n" in command("env")

        (tmp_path / "flows.py").write_text(FLOW)
        home = {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        deploy = [sys.executable, "-c", DEPLOY, str(tmp_path)]
        subprocess.run(deploy, env={**os.environ, **addresses, **home}, check=True, capture_output=True, timeout=200)
        wait_until((tmp_path / "flow.json").exists, 120)
        flow = json.loads((tmp_path / "flow.json").read_text())
        assert flow["mlflow"] == addresses["MLFLOW_TRACKING_URI"]
        pids = [json.loads(file.read_text())["pid"] for file in (tmp_path / ".services").glob("*.json")]
        assert len(pids) == 3
        assert all(alive(pid) for pid in [*pids, flow["pid"]])
    finally:
        printed = command("down")
    assert printed.count(": ended") == 3
    assert not any(alive(pid) for pid in [*pids, flow["pid"]])
    assert (tmp_path / "mlflow.db").stat().st_size > 0
    assert services_environment(tmp_path) == {}
    assert command("down").count(": was not running") == 3
