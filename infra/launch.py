"""End what an earlier start of a service left behind, then become that service.

A server that was killed may leave a process that holds its port, and the next start would fail. supervisord runs this
file with the service's command as arguments; see ``supervisord.conf``.
"""

from __future__ import annotations

import contextlib
import os
import sys

import psutil

#: In the environment of supervisord and of all that it starts: the folder of the services.
MARK = "DVDP_SERVICES"


def service_processes(folder: str, service: str | None = None) -> list[psutil.Process]:
    """All living processes but this one of one service, or of supervisord and all services.

    They are told by their environment: the flows that a worker starts have sessions of their own and outlive it.
    """
    wanted = {MARK: folder} | ({"SUPERVISOR_PROCESS_NAME": service} if service else {})
    # No environment can be read of other users' processes and of zombies.
    found = [(process, process.info["environ"] or {}) for process in psutil.process_iter(["environ"])]
    return [process for process, has in found if wanted.items() <= has.items() and process.pid != os.getpid()]


if __name__ == "__main__":
    for left_behind in service_processes(os.environ[MARK], os.environ["SUPERVISOR_PROCESS_NAME"]):
        with contextlib.suppress(psutil.NoSuchProcess):
            left_behind.kill()
    os.execvp(sys.argv[1], sys.argv[1:])
