"""What a team shares on one machine: an MLflow server, a Prefect server and a Prefect worker, loopback only.

    python -m infra.services up        start what is not running, wait until all are healthy (`make services`)
    python -m infra.services down      end them (`make services-down`); their data stay
    python -m infra.services status    what runs, where
    python -m infra.services env       the addresses, for `eval "$(python -m infra.services env)"`

Each is the leader of a session of its own, with ``.services/<name>.json`` (who it is) and ``.services/<name>.log``.
Flows that the worker starts get sessions of their own; they are told as ours by a mark in their environment.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dvdp.errors import UserError
from dvdp.files import locked, write_atomically
from pipelines.addresses import FOLDER, HEALTH, healthy, services_environment

__all__ = ["down", "services_environment", "up"]

HOST = "127.0.0.1"
POOL = "dvdp"
#: In the environment of every process of a service: which start of it.
MARK = "DVDP_SERVICE"
#: Seconds to become healthy, and to end before being killed.
START_LIMIT = 180
END_LIMIT = 15


@dataclass(frozen=True)
class Service:
    """How to start one service and how to see that it works."""

    name: str
    command: list[str]
    port: int | None
    """None: it listens nowhere."""
    health: str
    """Address that answers once it works."""


@dataclass(frozen=True)
class Record:
    """A started service: enough to tell its process from a later one that got the same number."""

    pid: int
    started: int
    """Clock ticks between boot and start, from /proc."""
    boot: str
    mark: str
    port: int | None

    def alive(self) -> bool:
        """Whether that very process runs."""
        return self.boot == _boot() and _start_time(self.pid) == self.started


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m infra.services", description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["up", "down", "status", "env"])
    parser.add_argument("--project", type=Path, default=Path.cwd(), help="project folder (default: the current one)")
    parser.add_argument("--mlflow-port", type=int, default=5000)
    parser.add_argument("--prefect-port", type=int, default=4200)
    options = parser.parse_args(arguments)
    try:
        if options.action == "up":
            up(options.project, options.mlflow_port, options.prefect_port)
        elif options.action == "down":
            down(options.project)
        elif options.action == "status":
            status(options.project)
        else:
            file = options.project / FOLDER / "env"
            if not file.is_file():
                raise UserError(f"services: found no file '{file}', expected running services; start them first.")
            print(file.read_text(), end="")
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def up(project: Path, mlflow_port: int = 5000, prefect_port: int = 4200) -> None:
    """Start the services that do not run, and wait until all are healthy.

    Raises:
        UserError: a port is taken, or a service ended or did not become healthy; those started here are ended again.
    """
    folder = project.resolve() / FOLDER
    folder.mkdir(exist_ok=True)
    with locked(folder / "lock"):  # two calls of up would start everything twice
        _up(folder, mlflow_port, prefect_port)


def down(project: Path) -> None:
    """End the services that :func:`up` recorded, with all that they started. Their data stay."""
    folder = project.resolve() / FOLDER
    if not folder.is_dir():
        print("services: none were started here")
        return
    with locked(folder / "lock"):
        (folder / "env").unlink(missing_ok=True)
        for name in ("worker", "prefect", "mlflow"):
            print(f"{name}: {'ended' if _end(folder, name) else 'was not running'}")


def status(project: Path) -> None:
    """Print a line for each service."""
    folder = project.resolve() / FOLDER
    for name in ("mlflow", "prefect", "worker"):
        record = _read(folder, name)
        print(f"{name}: " + (f"running, pid {record.pid}" if record and record.alive() else "not running"))
    for name, value in services_environment(project).items():
        print(f"{name}={value}")


def _up(folder: Path, mlflow_port: int, prefect_port: int) -> None:
    services = _services(folder, _port(folder, "mlflow", mlflow_port), _port(folder, "prefect", prefect_port))
    missing = [service for service in services if not _alive(folder, service.name)]
    for service in missing:
        if service.port is not None and _taken(service.port):
            raise UserError(
                f"services: found port {service.port} taken by another program, expected it free for {service.name};"
                f" end that program, or give another port with --{service.name}-port."
            )
    for service in services:
        if service not in missing:
            print(f"{service.name}: already running, {_where(folder, service)}")
    try:
        for service in missing:
            _start(folder, service, _environment(folder, services))
            # One after the other: the worker needs the Prefect server.
            _wait(folder, service)
    except BaseException:
        for service in reversed(missing):
            _end(folder, service.name)
        raise
    addresses = {name: _environment(folder, services)[name] for name in HEALTH}
    write_atomically(folder / "env", "".join(f"export {name}={value}\n" for name, value in addresses.items()))
    print(f"pages: {addresses['MLFLOW_TRACKING_URI']} and {addresses['PREFECT_API_URL'].removesuffix('/api')}")


def _services(folder: Path, mlflow_port: int, prefect_port: int) -> list[Service]:
    """In the order they need each other."""
    python = [sys.executable, "-m"]
    # The files that runs without services write to, so that either sees the other's runs.
    project = folder.parent
    store = ["--backend-store-uri", f"sqlite:///{project / 'mlflow.db'}"]
    artifacts = ["--no-serve-artifacts", "--default-artifact-root", (project / "mlartifacts").as_uri()]
    mlflow = [*python, "mlflow", "server", "--host", HOST, "--port", str(mlflow_port), "--workers", "1"]
    prefect = [*python, "prefect", "server", "start", "--host", HOST, "--port", str(prefect_port)]
    # Creates the work pool where it is missing.
    worker = [*python, "prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", "services"]
    api = f"http://{HOST}:{prefect_port}/api"
    return [
        Service("mlflow", [*mlflow, *store, *artifacts], mlflow_port, f"http://{HOST}:{mlflow_port}/health"),
        Service("prefect", prefect, prefect_port, f"{api}/health"),
        Service("worker", worker, None, f"{api}/work_pools/{POOL}/workers/filter"),
    ]


def _environment(folder: Path, services: list[Service]) -> dict[str, str]:
    ports = {service.name: service.port for service in services}
    # The worker's flows find the programs of this environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {
        **os.environ,
        "PATH": path,
        "MLFLOW_TRACKING_URI": f"http://{HOST}:{ports['mlflow']}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # Whoever reaches this machine by a tunnel calls it localhost; a foreign name is an attack.
        "MLFLOW_SERVER_ALLOWED_HOSTS": f"localhost:*,{HOST}:*",
        # Jobs are MLflow's evaluation of language models: two processes more, for nothing here.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": f"http://{HOST}:{ports['prefect']}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }


def _start(folder: Path, service: Service, environment: dict[str, str]) -> None:
    mark = f"{service.name}-{secrets.token_hex(8)}"
    with (folder / f"{service.name}.log").open("ab") as log:
        process = subprocess.Popen(
            service.command,
            cwd=folder.parent,
            env={**environment, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    record = Record(process.pid, _start_time(process.pid) or 0, _boot(), mark, service.port)
    write_atomically(folder / f"{service.name}.json", json.dumps(asdict(record)) + "\n")
    print(f"{service.name}: starting, log in {folder / f'{service.name}.log'}", flush=True)


def _wait(folder: Path, service: Service) -> None:
    began = time.monotonic()
    said = began
    while not _works(service, began):
        if not _alive(folder, service.name):
            raise UserError(
                f"services: {service.name} ended at once, expected it to run; {_last_words(folder, service)}"
            )
        now = time.monotonic()
        if now - began > START_LIMIT:
            raise UserError(
                f"services: {service.name} did not answer within {START_LIMIT} s; {_last_words(folder, service)}"
            )
        if now - said > 5:
            print(f"{service.name}: {now - began:.0f} s, not ready yet", flush=True)
            said = now
        time.sleep(0.3)
    print(f"{service.name}: ready after {time.monotonic() - began:.0f} s, {_where(folder, service)}", flush=True)


def _works(service: Service, began: float) -> bool:
    if service.name != "worker":
        return healthy(service.health, timeout=2)
    # A worker is there once the server has heard from it, since it was started.
    request = urllib.request.Request(service.health, b"{}", {"Content-Type": "application/json"}, method="POST")
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=2) as answer:
            workers = json.load(answer)
    except (OSError, ValueError):
        return False
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() - (time.monotonic() - began)))
    return any((worker.get("last_heartbeat_time") or "") >= since for worker in workers)


def _end(folder: Path, name: str) -> bool:
    """Terminate, then kill; whether there was anything to end."""
    record = _read(folder, name)
    if record is None:
        return False
    ours = set(_processes(record))
    existed = bool(ours)
    if record.alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.pid, signal.SIGTERM)
    deadline = time.monotonic() + END_LIMIT
    while _processes(record) and time.monotonic() < deadline:
        if not record.alive():
            # The leader is gone: what it left behind has nobody to wait for.
            _signal(record, signal.SIGTERM)
        time.sleep(0.2)
    while _processes(record):
        _signal(record, signal.SIGKILL)
        time.sleep(0.1)
    (folder / f"{name}.json").unlink(missing_ok=True)
    return existed


def _signal(record: Record, number: signal.Signals) -> None:
    for pid in _processes(record):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _processes(record: Record) -> list[int]:
    """All living processes of a service: those that carry its mark."""
    wanted = f"{MARK}={record.mark}".encode()
    return [pid for pid, environment in _environments() if wanted in environment.split(b"\0")]


def _environments() -> Iterator[tuple[int, bytes]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            # Gone in the meantime, or somebody else's. A zombie's is empty.
            with contextlib.suppress(OSError):
                yield int(entry.name), (entry / "environ").read_bytes()


def _read(folder: Path, name: str) -> Record | None:
    try:
        return Record(**json.loads((folder / f"{name}.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _port(folder: Path, name: str, otherwise: int) -> int:
    """The port of a service that runs already, else the one asked for."""
    record = _read(folder, name)
    return record.port if record and record.port and record.alive() else otherwise


def _alive(folder: Path, name: str) -> bool:
    record = _read(folder, name)
    return record is not None and record.alive()


def _start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process; None where it is gone or a zombie."""
    try:
        # The second field, the program's name, may hold spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


def _where(folder: Path, service: Service) -> str:
    record = _read(folder, service.name)
    place = f"http://{HOST}:{service.port}" if service.port else f"work pool '{POOL}'"
    return f"{place}, pid {record.pid if record else 'unknown'}"


def _last_words(folder: Path, service: Service) -> str:
    path = folder / f"{service.name}.log"
    lines = path.read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
    return f"its log {path} ends with '{last[:200]}'."


if __name__ == "__main__":
    sys.exit(main())
