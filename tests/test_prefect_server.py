"""Prefect's server answers this machine's pages and programs that know its secret, and nobody else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.prefect_server import new_secret

#: A flow on a temporary server, which asks that server in the place of others, and lists what its processes listen to.
FLOW = """
import base64, os
import httpx, psutil
from pipelines.prefect_server import guard_temporary_server
guard_temporary_server()
from prefect import flow
from prefect.server.api.server import SubprocessASGIServer
from tests.jobs.test_cluster import is_loopback, listening

def status(auth="", **headers):
    if auth:
        headers["Authorization"] = f"Basic {base64.b64encode(auth.encode()).decode()}"
    (server,) = {each.address for each in SubprocessASGIServer._instances.values()}
    return httpx.post(f"{server}/api/flows/filter", json={}, headers=headers).status_code

@flow
def asks():
    secret = os.environ["PREFECT_API_AUTH_STRING"]
    print("statuses", status(secret), status(), status("dvdp:guess"), status(secret, Host="evil.example"),
          status(secret, Origin="http://evil.example"))
    me = psutil.Process()
    heard = [(each, socket) for each in (me, *me.children(recursive=True)) for socket in listening(each)]
    print("loopback", bool(heard) and all(is_loopback(socket.laddr.ip) for _, socket in heard))
    print("told", secret in str([each.cmdline() for each in me.children(recursive=True)]))

asks()
"""


def test_every_secret_is_another_and_long() -> None:
    first, second = new_secret(), new_secret()
    assert first != second
    assert min(len(first), len(second)) > 40


@pytest.mark.slow
def test_the_temporary_server_of_a_run_refuses_strangers_and_the_flow_works(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"PREFECT_HOME": str(tmp_path), "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120"}
    done = subprocess.run([sys.executable, "-c", FLOW], env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["statuses 200 401 401 403 403", "loopback True", "told False"]
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert kept
    assert not [path for path in kept if b"dvdp:" in path.read_bytes()]
