"""Prefect's server as we run it: for pages and programs of this machine that know its secret.

    python -m uvicorn --factory pipelines.prefect_server:app --host 127.0.0.1 --port 4200

Prefect itself asks for the secret. It answers to any name of the machine and to any page's script, so that those are
refused here.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipelines.addresses import PREFECT_SECRET
from pipelines.loopback import LoopbackOnly

if TYPE_CHECKING:
    from starlette.types import ASGIApp

#: In the environment of the server; that of a client is :data:`pipelines.addresses.PREFECT_SECRET`.
SERVER_SECRET = "PREFECT_SERVER_API_AUTH_STRING"


def app() -> ASGIApp:
    """For uvicorn."""
    from prefect.server.api.server import create_app

    made = create_app(final=True)
    made.add_middleware(LoopbackOnly)
    return made


def new_secret() -> str:
    """A name and a password, as Prefect wants it."""
    return f"dvdp:{secrets.token_urlsafe(32)}"


def guard_temporary_server() -> None:
    """Let Prefect's temporary server, should this process start one, be :func:`app`, with a secret of its own.

    A server that the environment names is left alone, with whatever the environment says to authenticate there.
    """
    from prefect.context import refresh_global_settings_context
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import get_current_settings

    if get_current_settings().api.url:
        return
    os.environ[PREFECT_SECRET] = os.environ[SERVER_SECRET] = new_secret()
    refresh_global_settings_context()

    def start(self: SubprocessASGIServer) -> subprocess.Popen[Any]:
        command = [sys.executable, "-m", "uvicorn", "--factory", f"{__name__}:app", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--log-level", "error", "--lifespan", "on"]
        return subprocess.Popen(command, env=_environment(get_current_settings().to_environment_variables(True)))

    SubprocessASGIServer._run_uvicorn_command = start  # type: ignore[method-assign]


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    """As Prefect's own temporary server has it: without pages and schedules."""
    ours = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    return {**os.environ, **ours, **settings}
