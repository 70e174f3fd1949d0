"""What a team shares on one machine: an MLflow server, a Prefect server and a Prefect worker, loopback only.

    python -m infra.services up        start what is not running, wait until all are healthy (`make services`)
    python -m infra.services down      end them (`make services-down`); their data stay
    python -m infra.services status    what runs, where
    python -m infra.services env       the addresses, for `eval "$(.venv/bin/python -m infra.services env)"`

supervisord runs them (``supervisord.conf``) and starts again what ends unasked; ``up`` also starts a worker again that
hangs. ``.services/<name>.log`` is the log.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from xmlrpc.client import Fault, ServerProxy

import psutil
from supervisor.xmlrpc import SupervisorTransport

from dvdp.errors import UserError
from dvdp.files import locked, write_atomically
from infra.launch import MARK, service_processes
from pipelines.addresses import FOLDER, PREFECT_SECRET, healthy, read_environment, services_environment
from pipelines.environment import reach_loopback_directly, temporary_folder
from pipelines.prefect_server import SERVER_SECRET, new_secret

__all__ = ["down", "services_environment", "up"]

HOST = "127.0.0.1"
#: With the variable that holds its server's address, in the order they need each other.
SERVICES = {"mlflow": "MLFLOW_TRACKING_URI", "prefect": "PREFECT_API_URL", "worker": "PREFECT_API_URL"}
#: Seconds to become healthy, and to end before being killed.
START_LIMIT = 180
END_LIMIT = 15
#: Seconds without a heartbeat after which a worker hangs: it sends one every 30 s.
SILENCE = 90


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m infra.services", description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["up", "down", "status", "env"])
    parser.add_argument("--project", type=Path, default=Path.cwd(), help="project folder (default: the current one)")
    parser.add_argument("--mlflow-port", type=int, default=5000)
    parser.add_argument("--prefect-port", type=int, default=4200)
    options = parser.parse_args(arguments)
    file = options.project / FOLDER / "env"
    try:
        if options.action == "up":
            up(options.project, options.mlflow_port, options.prefect_port)
        elif options.action != "env":
            {"down": down, "status": status}[options.action](options.project)
        elif file.is_file():
            print(file.read_text(), end="")
        else:
            raise UserError(f"services: found no file '{file}', expected running services; start them first.")
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def up(project: Path, mlflow_port: int = 5000, prefect_port: int = 4200) -> None:
    """Start the services that do not run, and wait until all are healthy.

    Raises:
        UserError: a port is taken, or a service ended or did not become healthy; those started here are ended again.
    """
    reach_loopback_directly()  # The services inherit it.
    folder = project.resolve() / FOLDER
    folder.mkdir(exist_ok=True)
    folder.chmod(0o700)  # It holds the secret, logs and Prefect's database.
    with locked(folder / "lock"):  # two calls of up would start everything twice
        supervisor = connect(folder)
        missing = [name for name in SERVICES if not (supervisor and supervisor.getProcessInfo(name)["pid"])]
        asked = {
            "MLFLOW_TRACKING_URI": f"http://{HOST}:{mlflow_port}",
            "PREFECT_API_URL": f"http://{HOST}:{prefect_port}/api",
        }
        # The ports of a supervisord that runs are settled.
        addresses = asked | (read_environment(folder / "env") if supervisor else {})
        for name in missing:
            port = urlsplit(addresses[SERVICES[name]]).port or 0
            if name != "worker" and _taken(port):
                raise UserError(
                    f"services: found port {port} taken by another program, expected it free for {name}; end that"
                    f" program (`make services-down` if a crash left it), or give another port with --{name}-port."
                )
        try:
            supervisor = supervisor or _start_supervisor(folder, addresses)
            addresses |= read_environment(folder / "env")
            for name in SERVICES:  # one after the other: the worker needs the Prefect server
                if name == "worker" and name not in missing and _hangs(supervisor, addresses):
                    print(f"worker: no heartbeat for {SILENCE} s, it is ended", flush=True)
                    supervisor.signalProcess(name, "KILL")
                    missing.append(name)
                if name in missing:
                    print(f"{name}: starting, log in {folder / f'{name}.log'}", flush=True)
                    with contextlib.suppress(Fault):  # It may wait to be started again.
                        supervisor.stopProcess(name)
                    supervisor.startProcess(name, False)
                ready = _wait(folder, supervisor, name, addresses)
                print(f"{name}: {ready if name in missing else 'already running'}", flush=True)
        except BaseException:
            _end(folder, missing)
            raise
    print(f"pages: {addresses['MLFLOW_TRACKING_URI']} and {addresses['PREFECT_API_URL'].removesuffix('/api')}")
    if PREFECT_SECRET in addresses:
        print(f"Prefect's page asks for the line in {folder / 'secret'}")
    print(f'for a shell: eval "$({sys.executable} -m infra.services env)"')


def down(project: Path) -> None:
    """End the services that :func:`up` started, with all that they started. Their data stay."""
    folder = project.resolve() / FOLDER
    if not folder.is_dir():
        print("services: none were started here")
        return
    with locked(folder / "lock"):
        ended = _end(folder, list(SERVICES))
    for name in reversed(SERVICES):
        print(f"{name}: {'ended' if name in ended else 'was not running'}")


def status(project: Path) -> None:
    """Print a line for each service."""
    supervisor, answering = connect(project.resolve() / FOLDER), services_environment(project)
    for name in SERVICES:
        info = supervisor.getProcessInfo(name) if supervisor else {"statename": "not running", "description": ""}
        print(f"{name}: {info['statename'].lower()} {info['description']}".strip())
    if supervisor and "PREFECT_API_URL" in answering and _hangs(supervisor, answering):
        print(f"worker: no heartbeat for {SILENCE} s, it hangs; `make services` starts it again")
    for name, value in answering.items():
        if name != PREFECT_SECRET:
            print(f"{name}={value}")


def _secret(file: Path) -> str:
    """What Prefect's server asks for: made once, and for the eyes of this user alone."""
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as out:
            out.write(f"{new_secret()}\n")
    file.chmod(0o600)
    secret = file.read_text().strip()
    if not re.fullmatch(r"[\w-]+:[\w-]{20,}", secret):
        raise UserError(
            f"services: found no name and password in '{file}', expected a line such as dvdp:.. of at least 20 letters,"
            " digits, '-' and '_'; remove the file, and a new one is made."
        )
    return secret


def connect(folder: Path) -> Any:
    """The commands of the supervisord of this folder; None where none runs."""
    transport = SupervisorTransport(serverurl=f"unix://{_socket(folder)}")
    supervisor: Any = ServerProxy(f"http://{HOST}", transport=transport).supervisor
    try:
        supervisor.getState()
    except OSError:
        return None
    return supervisor


def _socket(folder: Path) -> Path:
    """Where supervisord listens: the system takes about 100 bytes, and supervisord needs some for its number."""
    path = folder / "supervisor.sock"
    if len(os.fsencode(path)) <= 90:
        return path
    private = temporary_folder(50) / f"dvdp-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}"
    if private.exists() and private.stat().st_uid != os.getuid():
        raise UserError(f"services: found '{private}' of another user, expected our own; remove it or set TMPDIR.")
    return private / path.name


def _start_supervisor(folder: Path, addresses: dict[str, str]) -> Any:
    here, addresses = Path(__file__).resolve().parent, addresses | {PREFECT_SECRET: _secret(folder / "secret")}
    _socket(folder).parent.mkdir(mode=0o700, exist_ok=True)
    environment = {
        **os.environ,
        **addresses,
        SERVER_SECRET: addresses[PREFECT_SECRET],
        MARK: str(folder),
        "DVDP_SERVICES_SOCKET": str(_socket(folder)),
        "DVDP_SERVICES_LAUNCHER": str(here / "launch.py"),
        "DVDP_SERVICES_MLFLOW_PORT": str(urlsplit(addresses["MLFLOW_TRACKING_URI"]).port),
        "DVDP_SERVICES_PREFECT_PORT": str(urlsplit(addresses["PREFECT_API_URL"]).port),
        "DVDP_SERVICES_ARTIFACTS": (folder.parent / "mlartifacts").as_uri(),
        # The services and the worker's flows find the programs of this environment, and our code.
        "PYTHONPATH": f"{here.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PREFECT_HOME": str(folder / "prefect"),
    }
    exported = addresses | {name: shlex.quote(os.environ[name]) for name in ("no_proxy", "NO_PROXY")}
    # A shell in which the environment is not active finds prefect, dvc and dvdp, too.
    exported["PATH"] = f'{shlex.quote(str(Path(sys.executable).parent))}:"$PATH"'
    write_atomically(folder / "env", "".join(f"export {name}={value}\n" for name, value in exported.items()))
    (folder / "env").chmod(0o600)
    with (folder / "supervisord.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "supervisor.supervisord", "-c", str(here / "supervisord.conf")],
            cwd=folder.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    while not (supervisor := connect(folder)):
        if process.poll() is not None:
            raise UserError(f"services: supervisord ended at once, expected it to run; {_last_words(folder)}")
        time.sleep(0.1)
    return supervisor


def _wait(folder: Path, supervisor: Any, name: str, addresses: dict[str, str]) -> str:
    """Return once it works; in words."""
    began = said = time.monotonic()
    process = supervisor.getProcessInfo(name)
    while not _works(folder, name, addresses, process):
        now = time.monotonic()
        if supervisor.getProcessInfo(name)["pid"] != process["pid"]:
            raise UserError(f"services: {name} ended at once, expected it to run; {_last_words(folder, name)}")
        if now - began > START_LIMIT:
            raise UserError(f"services: {name} did not answer within {START_LIMIT} s; {_last_words(folder, name)}")
        if now - said > 5:
            print(f"{name}: {now - began:.0f} s, not ready yet", flush=True)
            said = now
        time.sleep(0.3)
    return f"ready after {time.monotonic() - began:.0f} s, {addresses[SERVICES[name]]}, pid {process['pid']}"


def _works(folder: Path, name: str, addresses: dict[str, str], process: dict[str, Any]) -> bool:
    """Whether the process that supervisord runs does its work, and not one that an earlier start left behind."""
    if name == "worker":
        return _worker_works(addresses, process["start"])
    try:
        began = psutil.Process(process["pid"]).create_time()
        left_behind = any(other.create_time() < began for other in service_processes(str(folder), name))
    except psutil.NoSuchProcess:
        return False
    return not left_behind and healthy(f"{addresses[SERVICES[name]]}/health", 2)


def _hangs(supervisor: Any, addresses: dict[str, str]) -> bool:
    """Whether a worker that has run for some time has not been heard of."""
    process, since = supervisor.getProcessInfo("worker"), time.time() - SILENCE
    old = bool(process["pid"]) and process["start"] < since
    return old and not _worker_works(addresses, since)


def _worker_works(addresses: dict[str, str], started: float) -> bool:
    """Whether the server has heard from a worker since then, in unix seconds."""
    header = {"Content-Type": "application/json"}
    if secret := addresses.get(PREFECT_SECRET):
        header["Authorization"] = f"Basic {base64.b64encode(secret.encode()).decode()}"
    request = urllib.request.Request(f"{addresses['PREFECT_API_URL']}/work_pools/dvdp/workers/filter", b"{}", header)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=2) as answer:
            workers = json.load(answer)
    except (OSError, ValueError):
        return False
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(started))
    return any((worker.get("last_heartbeat_time") or "") >= since for worker in workers)


def _end(folder: Path, names: list[str]) -> list[str]:
    """End these services, supervisord with the last; which of them there were."""
    supervisor = connect(folder)
    ended = [name for name in names if service_processes(str(folder), name)]
    for name in reversed(names):
        if supervisor:
            with contextlib.suppress(Fault):  # It may not run.
                supervisor.stopProcess(name)
        _end_processes(folder, name)
    if len(names) == len(SERVICES):
        if supervisor:
            supervisor.shutdown()
        _end_processes(folder)
        for file in (folder / "env", _socket(folder)):  # A supervisord that was killed leaves its socket.
            file.unlink(missing_ok=True)
        if _socket(folder).parent != folder:
            shutil.rmtree(_socket(folder).parent, ignore_errors=True)
    return ended


def _end_processes(folder: Path, name: str | None = None) -> None:
    """Terminate, then kill, all processes of a service, or of all and supervisord."""
    deadline = time.monotonic() + END_LIMIT
    asked: set[psutil.Process] = set()
    while processes := service_processes(str(folder), name):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if time.monotonic() > deadline:
                    process.kill()
                elif process not in asked:
                    process.terminate()
        asked.update(processes)
        time.sleep(0.1)


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def _last_words(folder: Path, name: str = "supervisord") -> str:
    path = folder / f"{name}.log"
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
    return f"its log {path} ends with '{last[:200]}'."


if __name__ == "__main__":
    sys.exit(main())
