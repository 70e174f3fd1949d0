"""Ray: the cluster that settings train and sample on."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dvdp.config import ClusterParams
from dvdp.errors import UserError
from dvdp.hardware import cpus
from pipelines.environment import temporary_folder
from pipelines.jobs.failures import explain, keep
from pipelines.jobs.machine import holding_cores

#: Set before Ray is imported, and in every worker: quiet, prompt, and an allocator that keeps large blocks.
WORKER_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A call after the cluster has ended must fail, not start another one.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # A process for each run, which tells training of a node that is about to go; ours goes on from its checkpoints.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Else a task that is ended for want of memory is tried again for ever.
    "RAY_task_oom_retries": "3",
}

#: What a user may set about Ray's authentication; any of it is obeyed.
AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")

#: Of all clusters that this process starts, since Ray keeps the first that it reads.
TOKEN = secrets.token_hex(32)


class Slots(threading.Semaphore):
    """As many as runs fit on the cluster at a time; each run holds one."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self._count, self._counting = count, threading.Lock()

    def fewer(self) -> bool:
        """Let one slot, which the caller holds, be gone for good, and wait for another; False if it is the last."""
        with self._counting:
            if self._count == 1:
                return False
            self._count -= 1
        return self.acquire()


@contextlib.contextmanager
def cluster(params: ClusterParams) -> Iterator[Slots]:
    """Join the cluster at ``RAY_ADDRESS``, or start one on this machine for as long as the block lasts.

    Nobody else can use the one on this machine (see :func:`close_to_others`), and there is one at a time
    (:mod:`pipelines.jobs.machine`); Ray itself divides the one at ``RAY_ADDRESS``. How to authenticate there is the
    environment's to say.

    Yields its slots: each training run holds one, and there are as many as runs fit at a time.

    Raises:
        UserError: the cluster does not answer, or has not the CPUs and GPUs that a run asks for.
        Busy: another run uses this machine, and ``cluster.busy`` is ``leave``.
    """
    address = check_address()
    check_storage(params.storage)
    os.environ.update(WORKER_ENVIRONMENT)
    if not address:
        close_to_others()
    import ray

    variables = {**WORKER_ENVIRONMENT, "OMP_NUM_THREADS": str(params.threads)}
    sizes: dict[str, Any] = {}
    if not address:
        sizes = {
            "num_cpus": max(cpus(), params.num_workers * params.threads),
            "include_dashboard": False,
            "object_store_memory": 200 * 2**20,
        }
    with (
        contextlib.nullcontext() if address else holding_cores(params.busy),
        contextlib.nullcontext() if address else private_folder() as folder,
    ):
        if folder:
            variables["TMPDIR"] = sizes["_temp_dir"] = str(folder)
        with restored_interrupt():
            try:
                ray.init(
                    address=address or "local",
                    runtime_env={"env_vars": variables},
                    # What workers have to say comes through their run's log file; see following.
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    **sizes,
                )
            except (ConnectionError, ValueError) as error:
                raise UserError(
                    f"RAY_ADDRESS: found no cluster at '{address}' ({error}); start it, or unset RAY_ADDRESS to run"
                    " here."
                ) from None
        try:
            with restored_interrupt():
                yield Slots(_slots(params, ray.cluster_resources()))
        finally:
            ray.shutdown()


def close_to_others() -> None:
    """Let a cluster of this process listen on loopback alone, and refuse a call without its token.

    Ray reads these variables when it is imported, and the cluster's processes inherit them. They are no part of the
    runtime environment, which Ray writes to its logs.
    """
    # Without support for several nodes Ray takes 127.0.0.1 for this one's address; init(_node_ip_address="127.0.0.1")
    # would be replaced by an address that other machines can reach.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    loopback = socket.if_indextoname(1)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, loopback)
    if not any(name in os.environ for name in AUTHENTICATION):
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)


#: Bytes of a folder below which Ray's sockets have paths of 107 bytes, which is what the system takes.
LONGEST = 107 - len("/session_2026-11-30_10-33-00_123456_1234567/sockets/plasma_store")


def ray_folder() -> Path:
    """The folder in which Ray's own is; see :func:`pipelines.environment.temporary_folder`."""
    return temporary_folder(LONGEST - len("/dvdp-12345678"))


@contextlib.contextmanager
def private_folder() -> Iterator[Path | None]:
    """A folder for Ray and its workers while the block runs; None where the one that Ray would choose can be used."""
    usual = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"
    # Another user may have made it.
    if ray_folder() == usual.parent and (not usual.exists() or (usual.is_dir() and os.access(usual, os.W_OK))):
        yield None
        return
    folder = Path(tempfile.mkdtemp(prefix="dvdp-", dir=ray_folder()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_storage(storage: Path) -> None:
    """Make ``cluster.storage`` where it is missing.

    Raises:
        UserError: it is no folder that can be written.
    """
    problem = "that is an address" if re.match("[a-z0-9+]+:/", str(storage)) else ""
    if not problem:
        try:
            storage.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=storage).close()
        except (OSError, ValueError) as error:
            problem = getattr(error, "strerror", None) or str(error)
    if problem:
        raise UserError(
            f"cluster.storage: found '{str(storage)[:200]}', where nothing can be written ({problem}), expected a"
            " folder that all nodes see; name another."
        )


def check_address() -> str:
    """``RAY_ADDRESS``, or the empty string for a cluster of our own.

    Ray itself would try a dead address for over a minute, and then end the process.

    Raises:
        UserError: it is no address, or nothing listens there.
    """
    address = os.environ.get("RAY_ADDRESS", "").strip()
    if address in ("", "local", "auto"):
        return address.removeprefix("local")
    problem = ""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        if parts.scheme not in ("", "ray") or not parts.hostname or parts.port is None:
            raise UserError("it is not of the form host:port")
        socket.create_connection((parts.hostname, parts.port), timeout=10).close()
    except (OSError, ValueError) as error:
        problem = str(error)
    if problem:
        raise UserError(
            f"RAY_ADDRESS: found nothing that answers at '{address}' ({problem}), expected a Ray cluster, such as"
            " 10.0.0.1:6379; start it, or unset RAY_ADDRESS to run here."
        )
    return address


def _slots(params: ClusterParams, there: Mapping[str, float]) -> int:
    needed = {"CPU": params.num_workers * params.threads, "GPU": params.num_workers * params.gpu}
    for name, count in needed.items():
        if there.get(name, 0) < count:
            raise UserError(
                f"cluster: found {there.get(name, 0):g} {name}s, expected at least {count} for {params.num_workers}"
                " workers; lower cluster.num_workers or cluster.threads, or add nodes."
            )
    return min(int(there[name] // count) for name, count in needed.items() if count)


@contextlib.contextmanager
def restored_interrupt() -> Iterator[None]:
    """Give the signals that end a command their meaning back: Ray replaces handlers and leaves its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def on_workers(
    params: ClusterParams, work: Callable[..., Any], arguments: list[tuple[Any, ...]], slots: threading.Semaphore
) -> Iterator[Any]:
    """Run ``work(*arguments[i])`` on the cluster, and yield the results as they come.

    Args:
        slots: of the cluster. The caller holds one of it, for as many tasks at a time as a run has ranks. What nobody
            else holds, now or later, is taken as well until all is done.

    Raises:
        UserError: the work's, or why it could not be done; the traceback of a worker is in ``cluster.storage``.
    """
    import ray

    remote = ray.remote(num_cpus=params.threads, num_gpus=int(params.gpu), max_retries=params.max_failures)(work)
    left, taken = deque(arguments), 0
    waiting: list[Any] = []
    try:
        while left or waiting:
            while left:
                if len(waiting) == (1 + taken) * params.num_workers:
                    if not slots.acquire(blocking=False):
                        break
                    taken += 1
                waiting.append(remote.remote(*left.popleft()))
            done, waiting = ray.wait(waiting)
            try:
                yield from ray.get(done)
            except ray.exceptions.RayError as error:
                raise _explained(error, params) from None
    finally:
        for _ in range(taken):
            slots.release()


def _explained(error: Exception, params: ClusterParams) -> UserError:
    """What to raise for an error of Ray's in a task."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, UserError):
        return cause
    failure = explain(error)
    where = f"; its traceback is in {keep(str(error), params.storage)}" if cause else ""
    return UserError(f"cluster: {failure.text}{where}; what is finished is kept, run the same command again.")
