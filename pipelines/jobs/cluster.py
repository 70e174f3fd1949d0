"""Ray: the cluster that settings train, sample and are scored on."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

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


class Slots:
    """The workers that fit on the cluster at a time; whoever has work for some of them holds as many.

    A run takes one for each of its ranks, all at once, and then waits for none. Nobody else waits at all: a run's
    samples are drawn in its own slots and in those that nobody waits for, and scored in one of its own. So there is no
    deadlock, however few there are, and whoever holds a slot finds its CPUs and its GPU free in Ray. That matters:
    without slots a scorer would wait in Ray's queue while setting after setting trains, or take the CPU of one, which
    Ray Train then fails after four minutes.
    """

    def __init__(self, count: int) -> None:
        self._count = self._free = count
        self._waiting = 0
        self._changed = threading.Condition()

    def hold(self, number: int) -> Held:
        """Wait for so many, and hold them."""
        self._take(number)
        return Held(self, number)

    def spare(self) -> bool:
        """Take one if it is free and nobody waits; whether that was so."""
        with self._changed:
            taken = self._free > 0 and not self._waiting
            self._free -= taken
            return taken

    def give(self, number: int) -> None:
        """Give so many back."""
        with self._changed:
            self._free += number
            self._changed.notify_all()

    def fewer(self, number: int) -> bool:
        """See :meth:`Held.fewer`."""
        with self._changed:
            if self._count < 2 * number:
                return False
            self._count -= number
        self._take(number)
        return True

    def _take(self, number: int) -> None:
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: self._free >= number)
            finally:
                self._waiting -= 1
            self._free -= number


class Held:
    """Slots that somebody holds; as a context manager until the block ends."""

    def __init__(self, slots: Slots, number: int) -> None:
        self._slots = slots
        self.number = number

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self, *_: object) -> None:
        """Give all back; whatever is passed is passed over."""
        self.keep(0)

    def keep(self, number: int) -> None:
        """Give back all above so many."""
        given, self.number = max(0, self.number - number), min(self.number, number)
        self._slots.give(given)

    def more(self) -> bool:
        """Hold one more if it is free and nobody waits for it; whether that was so."""
        more = self._slots.spare()
        self.number += more
        return more

    def fewer(self) -> bool:
        """Let all of these be gone for good, and wait for as many others; False if they are the last."""
        return self._slots.fewer(self.number)


@contextlib.contextmanager
def cluster(params: ClusterParams) -> Iterator[Slots]:
    """Join the cluster at ``RAY_ADDRESS``, or start one on this machine for as long as the block lasts.

    Nobody else can use the one on this machine (see :func:`close_to_others`), and there is one at a time
    (:mod:`pipelines.jobs.machine`); Ray itself divides the one at ``RAY_ADDRESS``. How to authenticate there is the
    environment's to say.

    Yields its slots, one for each worker that fits.

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
    each = {"CPU": params.threads, "GPU": int(params.gpu)}
    for name, count in each.items():
        if there.get(name, 0) < params.num_workers * count:
            raise UserError(
                f"cluster: found {there.get(name, 0):g} {name}s, expected at least {params.num_workers * count} for"
                f" {params.num_workers} workers; lower cluster.num_workers or cluster.threads, or add nodes."
            )
    return min(int(there[name] // count) for name, count in each.items() if count)


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


#: Pieces of work that a worker has at a time: the one that it does, and the next.
PIECES = 2

#: Begins a piece of work, and returns what ends it. Pieces are begun one after the other in one thread; the end of one,
#: such as writing a file, goes on beside the next.
Work = Callable[..., Callable[[], Any]]


def on_workers(
    params: ClusterParams, start: Callable[[], Work], arguments: Sequence[tuple[Any, ...]], held: Held
) -> Iterator[Any]:
    """Do pieces of work on the cluster, ``start()(*arguments[i])()``, and yield their results as they come.

    A worker is a process that calls ``start`` once, which may take long, as loading a model does, and then does piece
    after piece. It has the next one before it has ended the last. One that dies is started again, up to
    ``cluster.max_failures`` times, and does again what it had not finished.

    Args:
        held: there are as many workers as slots are held, and one more for each that nobody else holds or waits for;
            these are given back one by one, as soon as there is nothing left for a worker to do.

    Raises:
        UserError: the work's, or why it could not be done; the traceback of a worker is in ``cluster.storage``.
    """
    import ray

    left, own, name = deque(arguments), held.number, _name(start)
    loads: dict[Any, int] = {}
    pieces: dict[Any, Any] = {}

    def who() -> Any:
        """The worker for the next piece; None if it had better wait."""
        idlest = min(loads, key=loads.__getitem__, default=None)
        if idlest is not None and not loads[idlest]:
            return idlest
        if len(loads) < held.number or held.more():
            return _worker(params, start)
        # The last pieces wait for whoever is done first.
        return idlest if loads[idlest] < PIECES and len(left) >= len(loads) else None

    try:
        while left or pieces:
            while left and (worker := who()) is not None:
                pieces[worker.do.options(name=name).remote(*left.popleft())] = worker
                loads[worker] = loads.get(worker, 0) + 1
            done, _ = ray.wait(list(pieces))
            try:
                results = ray.get(done)
            except ray.exceptions.RayError as error:
                raise _explained(error, params) from None
            for piece in done:
                loads[pieces.pop(piece)] -= 1
            for worker in [worker for worker, load in loads.items() if not load and not left]:
                ray.kill(worker)
                del loads[worker]
                held.keep(max(own, len(loads)))
            yield from results
    finally:
        for worker in loads:
            ray.kill(worker)
        held.keep(own)


def on_worker(params: ClusterParams, work: Callable[..., Any], *arguments: Any) -> Any:
    """``work(*arguments)``, done on the cluster by a worker of its own, whose progress bar is shown here.

    The caller holds a slot for it, see :class:`Slots`. A worker that dies is started again, as in :func:`on_workers`.

    Raises:
        UserError: the work's, or why it could not be done; the traceback of a worker is in ``cluster.storage``.
    """
    import ray

    worker = _worker(params, lambda: lambda *given: partial(work, *given))
    try:
        piece = worker.do.options(name=_name(work)).remote(*arguments)
        with tqdm(bar_format="{desc}", disable=None, leave=False) as bar:
            while not ray.wait([piece], timeout=None if bar.disable else 0.5)[0]:
                bar.set_description_str(ray.get(worker.shown.remote()))
        return ray.get(piece)
    except ray.exceptions.RayError as error:
        raise _explained(error, params) from None
    finally:
        ray.kill(worker)


def _worker(params: ClusterParams, start: Callable[[], Work]) -> Any:
    import ray

    asked = ray.remote(_Worker).options(
        num_cpus=params.threads,
        num_gpus=int(params.gpu),
        max_restarts=params.max_failures,
        max_task_retries=-1,
        max_concurrency=PIECES,
    )
    return asked.remote(start)


def _name(work: Callable[..., Any]) -> str:
    """What the process is called while it works."""
    return str(getattr(getattr(work, "func", work), "__name__", "work"))


class _Worker:
    """A process of the cluster; see :func:`on_workers`."""

    def __init__(self, start: Callable[[], Work]) -> None:
        self._start, self._thread = start, ThreadPoolExecutor(max_workers=1)
        self._work: Work | None = None
        self._terminal = sys.stderr = _Terminal()

    def do(self, *arguments: Any) -> Any:
        """A piece of work."""
        return self._thread.submit(self._begin, *arguments).result()()

    def _begin(self, *arguments: Any) -> Callable[[], Any]:
        if self._work is None:
            self._work = self._start()
        return self._work(*arguments)

    def shown(self) -> str:
        """The last state of its progress bars."""
        return self._terminal.line


class _Terminal(io.TextIOBase):
    """Progress bars take it for a terminal. It keeps their last state; all else goes to Ray's log files."""

    def __init__(self) -> None:
        self._log, self.line = sys.stderr, ""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._log.fileno()

    def write(self, text: str) -> int:
        if not text.startswith("\r"):
            return self._log.write(text)
        self.line = text.strip() or self.line
        return len(text)

    def flush(self) -> None:
        self._log.flush()


def _explained(error: Exception, params: ClusterParams) -> UserError:
    """What to raise for an error of Ray's in a task."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, UserError):
        return cause
    failure = explain(error, actor="a worker")
    where = f"; its traceback is in {keep(str(error), params.storage)}" if cause else ""
    return UserError(f"cluster: {failure.text}{where}; what is finished is kept, run the same command again.")
