"""The team's services come up together, are found, and go away without taking anything else with them."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from infra import launch, services
from pipelines.addresses import PREFECT_SECRET, services_environment
from tests.jobs.test_cluster import is_loopback, listening
from tests.tracking.support import free_port, wait_until

PROJECT = Path(__file__).parents[2]


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def marked(project: Path, service: str) -> dict[str, str]:
    """The environment of what a service of this project started."""
    return {**os.environ, launch.MARK: str(project.resolve() / ".services"), "SUPERVISOR_PROCESS_NAME": service}


def pids(project: Path) -> dict[str, int]:
    """Of each service, 0 where it does not run."""
    supervisor = services.connect(project / ".services")
    return {info["name"]: info["pid"] for info in supervisor.getAllProcessInfo()}


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
    assert services.connect(tmp_path / ".services") is None
    assert [file.name for file in (tmp_path / ".services").iterdir()] == ["lock"]


def test_down_without_services_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert services.main(["down", "--project", str(tmp_path)]) == 0
    assert "none were started" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", [1, 120])
def test_supervisord_listens_to_its_user_only_wherever_the_project_lies(length: int) -> None:
    addresses = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1", "PREFECT_API_URL": "http://127.0.0.1:2/api"}
    with tempfile.TemporaryDirectory() as short:
        project = Path(short).resolve() / (" %d;" + "x" * length)
        folder = project / ".services"
        folder.mkdir(parents=True)
        path = services._socket(folder)
        assert (path.parent == folder) == (length == 1)
        supervisor = services._start_supervisor(folder, addresses)
        try:
            assert pids(project) == {"mlflow": 0, "prefect": 0, "worker": 0}
            number = supervisor.getPID()
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
            for name in ("secret", "env"):
                assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
            secret = (folder / "secret").read_text().strip()
            assert secret not in " ".join(psutil.Process(number).cmdline())
            assert services.read_environment(folder / "env") == addresses | {PREFECT_SECRET: secret}
            connections = psutil.Process(number).net_connections("all")
            assert {connection.family for connection in connections} == {socket.AF_UNIX}
        finally:
            services.down(project)
        assert not alive(number)
        assert services.connect(folder) is None
        assert path.parent == folder or not path.parent.exists()


def test_a_process_of_another_project_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".services").mkdir()
    stranger = subprocess.Popen(["sleep", "60"], env=marked(tmp_path / "other", "mlflow"))
    try:
        (tmp_path / ".services" / "supervisord.pid").write_text(f"{stranger.pid}\n")
        services.down(tmp_path)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_down_ends_what_a_service_left_behind_in_sessions_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flows of a worker are such processes; one here ignores the polite request, and the worker is dead already."""
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    )
    (tmp_path / ".services").mkdir()
    child = subprocess.Popen(
        [sys.executable, "-c", stubborn],
        env=marked(tmp_path, "worker"),
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()
    monkeypatch.setattr(services, "END_LIMIT", 1)
    services.down(tmp_path)
    assert child.wait(10) == -signal.SIGKILL
    assert "worker: ended\n" in capsys.readouterr().out


def test_a_start_ends_what_an_earlier_one_of_the_same_service_left_behind(tmp_path: Path) -> None:
    """Such a process may hold the port; another service's does not."""
    left_behind = subprocess.Popen(["sleep", "60"], env=marked(tmp_path, "mlflow"))
    other = subprocess.Popen(["sleep", "60"], env=marked(tmp_path, "worker"))
    try:
        start = [sys.executable, str(PROJECT / "infra" / "launch.py"), "echo", "started"]
        done = subprocess.run(start, env=marked(tmp_path, "mlflow"), capture_output=True, text=True, check=True)
        assert done.stdout == "started\n"
        assert left_behind.wait(10) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        for process in (left_behind, other):
            process.kill()
            process.wait()


def status(request: str, method: str = "GET", auth: str = "", **headers: str) -> int:
    """The answer to a request, with these headers."""
    if auth:
        headers["Authorization"] = f"Basic {base64.b64encode(auth.encode()).decode()}"
    body = {"content": "{}"} if method == "POST" else {}
    return httpx.request(method, request, headers={"Content-Type": "application/json", **headers}, **body).status_code


def refuses_strangers(addresses: dict[str, str], secret: str) -> None:
    """A page that is open in the user's browser, and another user, get nothing from either server."""
    prefect, mlflow = addresses["PREFECT_API_URL"], addresses["MLFLOW_TRACKING_URI"]
    flows, port = f"{prefect}/flows/filter", urlsplit(prefect).port
    assert status(flows, "POST", secret) == 200
    assert status(flows, "POST") == status(flows, "POST", "dvdp:guess") == 401
    for origin in (f"http://127.0.0.1:{port}", f"http://localhost:{port}"):
        assert status(flows, "POST", secret, Origin=origin) == 200
        assert status(flows, "OPTIONS", Origin=origin, **{"Access-Control-Request-Method": "POST"}) == 200
    page = prefect.removesuffix("/api")
    assert status(f"{page}/ui-settings") == 200
    for headers in ({"Host": "evil.example"}, {"Host": f"evil.example:{port}"}, {"Origin": "http://evil.example"}):
        for address in (flows, f"{page}/ui-settings", f"{prefect}/health"):
            assert status(address, "POST" if address == flows else "GET", secret, **headers) == 403
        search = f"{mlflow}/api/2.0/mlflow/experiments/create"
        assert status(search, "POST", **headers) == 403
    assert status(f"{mlflow}/api/2.0/mlflow/experiments/search?max_results=1", Host="evil.example") == 403
    assert status(f"{mlflow}/api/2.0/mlflow/experiments/search?max_results=1") == 200


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


LIMITED = """
import sys
from prefect import flow
from prefect.deployments import run_deployment
long = flow.from_source(source=sys.argv[1], entrypoint="flows.py:long")
long.deploy(
    name="test", work_pool_name="dvdp", build=False, push=False, print_next_steps=False, concurrency_limit=1
)
print(run_deployment("long/test", timeout=0).id)
"""
STATE = """
import sys
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    print(client.read_flow_run(sys.argv[1]).state_type.value)
"""


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_after_a_reboot_the_dead_scheduled_run_gives_back_its_slot(tmp_path: Path) -> None:
    ports = free_port(), free_port()
    home = {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    (tmp_path / "flows.py").write_text(FLOW)

    def run(script: str, argument: str) -> str:
        environment = {**os.environ, **services_environment(tmp_path, timeout=20), **home}
        command = [sys.executable, "-c", script, argument]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()[-1]

    try:
        services.up(tmp_path, *ports)
        dead = run(LIMITED, str(tmp_path))
        wait_until((tmp_path / "flow.json").exists, 120)
        for process in services.service_processes(str(tmp_path / ".services")):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        wait_until(lambda: not services.service_processes(str(tmp_path / ".services")), 20)
        (tmp_path / "flow.json").unlink()

        services.up(tmp_path, *ports)
        assert run(STATE, dead) == "CRASHED"
        run(LIMITED, str(tmp_path))
        wait_until((tmp_path / "flow.json").exists, 120)
    finally:
        services.down(tmp_path)


@pytest.mark.slow
def test_a_failed_start_is_one_sentence_and_ends_what_was_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".services").mkdir()
    (tmp_path / ".services" / "prefect").write_text("not the folder that Prefect expects")
    ports = [free_port(), free_port()]
    arguments = ["up", "--project", str(tmp_path), "--mlflow-port", str(ports[0]), "--prefect-port", str(ports[1])]
    assert services.main(arguments) == 1
    printed = capsys.readouterr()
    assert "mlflow: ready after" in printed.out
    assert printed.err.startswith("services: prefect ended at once, expected it to run; its log ")
    assert len(printed.err.strip().splitlines()) == 1
    assert not services.service_processes(str(tmp_path / ".services"))
    assert services_environment(tmp_path) == {}
    assert not (tmp_path / ".services" / "env").exists()


@pytest.mark.slow
def test_services_come_up_behind_a_dead_proxy_run_flows_and_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    proxies = dict.fromkeys(("HTTP_PROXY", "https_proxy"), "http://127.0.0.1:9") | {"ALL_PROXY": "socks5://127.0.0.1:9"}
    ports = ["--mlflow-port", str(free_port()), "--prefect-port", str(free_port())]

    def command(*arguments: str) -> str:
        line = [sys.executable, "-m", "infra.services", *arguments, "--project", str(tmp_path)]
        environment = {**os.environ, **proxies, "PREFECT_WORKER_HEARTBEAT_SECONDS": "1"}
        done = subprocess.run(line, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        return done.stdout

    try:
        printed = command("up", *ports)
        assert printed.count(": ready after") == 3
        addresses = services_environment(tmp_path, timeout=120)
        secret = (tmp_path / ".services" / "secret").read_text().strip()
        assert addresses == {
            PREFECT_SECRET: secret,
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{ports[1]}",
            "PREFECT_API_URL": f"http://127.0.0.1:{ports[3]}/api",
        }
        started = pids(tmp_path)
        assert command("up").count(": already running") == 3
        assert pids(tmp_path) == started
        assert f"export PREFECT_API_URL={addresses['PREFECT_API_URL']}\n" in command("env")
        refuses_strangers(addresses, secret)
        processes = services.service_processes(str(tmp_path / ".services"))
        heard = [each for process in processes for each in listening(process)]
        assert {str(each.laddr.port) for each in heard} >= {ports[1], ports[3]}
        assert all(is_loopback(each.laddr.ip) for each in heard)
        fresh = ["env", "-i", "PATH=/usr/bin:/bin", "sh", "-c", 'eval "$0"; command -v prefect', command("env")]
        found = subprocess.run(fresh, capture_output=True, text=True, check=True).stdout.strip()
        assert found == str(Path(sys.executable).parent / "prefect")

        (tmp_path / "flows.py").write_text(FLOW)
        home = {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        deploy = [sys.executable, "-c", DEPLOY, str(tmp_path)]
        subprocess.run(deploy, env={**os.environ, **addresses, **home}, check=True, capture_output=True, timeout=200)
        wait_until((tmp_path / "flow.json").exists, 120)
        flow = json.loads((tmp_path / "flow.json").read_text())
        assert flow["mlflow"] == addresses["MLFLOW_TRACKING_URI"]
        assert all(alive(pid) for pid in [*started.values(), flow["pid"]])

        # A worker that hangs is noticed and started again, and its flow goes on.
        monkeypatch.setattr(services, "SILENCE", 3)
        os.kill(started["worker"], signal.SIGSTOP)
        time.sleep(4)
        services.status(tmp_path)
        assert "worker: no heartbeat for 3 s, it hangs" in capsys.readouterr().out
        services.up(tmp_path)
        assert {name for name, pid in pids(tmp_path).items() if pid != started[name]} == {"worker"}
        assert alive(flow["pid"])
        started = pids(tmp_path)

        # What ends unasked is started again, and the flows of a killed worker go on.
        for pid in started.values():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: all(pid not in (0, started[name]) for name, pid in pids(tmp_path).items()), 60)
        assert command("up").count("starting") == 0
        assert services_environment(tmp_path, timeout=120) == addresses
        assert alive(flow["pid"])
        started = pids(tmp_path)
    finally:
        printed = command("down")
    assert printed.count(": ended") == 3
    kept = {file for file in (tmp_path / ".services").rglob("*") if file.is_file()}
    assert [file.name for file in kept if secret.encode() in file.read_bytes()] == ["secret"]
    assert not any(alive(pid) for pid in [*started.values(), flow["pid"]])
    assert not services.service_processes(str(tmp_path / ".services"))
    assert (tmp_path / "mlflow.db").stat().st_size > 0
    assert services_environment(tmp_path) == {}
    assert command("down").count(": was not running") == 3
