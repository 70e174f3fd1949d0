"""The cores of this machine: one cluster of ours uses a core at a time, whatever project, user or flow run starts it.

The lock of a core is a Unix socket with a name and no file (Linux's abstract ones): the system drops it with its
process, it needs no folder that all can write, and whoever asks learns which process holds it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct
import time
from collections.abc import Iterator
from typing import Literal

import psutil

from dvdp.errors import UserError

logger = logging.getLogger("dvdp.jobs")

#: Seconds between two tries to get the cores.
PAUSE = 1.0


class Busy(UserError):  # noqa: N818 - a state of affairs, not a mistake
    """Another run uses the cores, and ``cluster.busy`` says to leave them to it."""


@contextlib.contextmanager
def holding_cores(busy: Literal["wait", "leave", "share"], cores: set[int] | None = None) -> Iterator[None]:
    """Hold the cores that this process may use while the block runs.

    Args:
        busy: what to do while others hold some of them; ``share`` neither looks nor holds.
        cores: by number; default: those of its affinity, which containers, jobs of SLURM and ``taskset`` set.

    Raises:
        Busy: another run holds some of them, and ``busy`` is ``leave``.
    """
    if busy == "share" or not hasattr(os, "sched_getaffinity"):
        yield
        return
    wanted = sorted(os.sched_getaffinity(0) if cores is None else cores)
    with contextlib.ExitStack() as stack:
        holder = ""
        while core := _take(wanted, stack):
            if not holder:
                holder = _holder(core)
                if busy == "leave":
                    raise Busy(
                        f"cluster.busy: found the cores of this machine in use by {holder}, expected them free, as it"
                        " is 'leave'; run this later, or let it 'wait'."
                    )
                logger.info("waiting for the cores of this machine, which %s uses", holder)
            time.sleep(PAUSE)
        yield


def _name(core: int) -> str:
    # SLURM divides the cores of a node among jobs, even where it does not bind them.
    return f"\0dvdp-{os.environ.get('SLURM_JOB_ID', '')}-core-{core}"


def _take(cores: list[int], stack: contextlib.ExitStack) -> str:
    """Hold all of them until the stack is closed, and return nothing; or hold none, and name a lock that is taken."""
    with contextlib.ExitStack() as taken:
        for core in cores:
            lock = taken.enter_context(socket.socket(socket.AF_UNIX))
            try:
                lock.bind(_name(core))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                return _name(core)
            lock.listen(socket.SOMAXCONN)
        stack.push(taken.pop_all())
    return ""


def _holder(lock: str) -> str:
    """The process that holds a lock, for people."""
    with contextlib.suppress(OSError, psutil.Error), socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(1)
        caller.connect(lock)
        pid, _, _ = struct.unpack("3i", caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        process = psutil.Process(pid)
        return f"process {pid} ({' '.join(process.cmdline())[:100]}, in {process.cwd()})"
    return "another run"
