"""Ray: the cluster that settings train and sample on."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dvdp.config import ClusterParams, Run
from dvdp.errors import UserError
from dvdp.files import write_atomically

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
}

#: What a user may set about Ray's authentication; any of it is obeyed.
AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")

#: Of all clusters that this process starts, since Ray keeps the first that it reads.
TOKEN = secrets.token_hex(32)


#: File of a run's folder with the status lines of training.
LOG = "log.txt"


@contextlib.contextmanager
def cluster(params: ClusterParams) -> Iterator[threading.Semaphore]:
    """Join the cluster at ``RAY_ADDRESS``, or start one on this machine for as long as the block lasts.

    Nobody else can use the one on this machine (see :func:`close_to_others`). How to authenticate at ``RAY_ADDRESS``
    is the environment's to say.

    Yields its room: each training run holds one of it, and there is as much as runs fit at a time.

    Raises:
        UserError: the cluster does not answer, or has not the CPUs and GPUs that a run asks for.
    """
    check_address()
    address = os.environ.get("RAY_ADDRESS")
    os.environ.update(WORKER_ENVIRONMENT)
    if not address:
        close_to_others()
    import ray

    environment = {"env_vars": {**WORKER_ENVIRONMENT, "OMP_NUM_THREADS": str(params.threads)}}
    sizes: dict[str, Any] = {}
    if not address:
        sizes = {
            "num_cpus": max(len(os.sched_getaffinity(0)), params.num_workers * params.threads),
            "include_dashboard": False,
            "object_store_memory": 200 * 2**20,
        }
    with restored_interrupt():
        try:
            ray.init(
                address=address or "local",
                runtime_env=environment,
                # What workers have to say comes through their run's log file; see following.
                log_to_driver=False,
                logging_level=logging.WARNING,
                **sizes,
            )
        except (ConnectionError, ValueError) as error:
            raise UserError(
                f"RAY_ADDRESS: found no cluster at '{address}' ({error}); start it, or unset RAY_ADDRESS to run here."
            ) from None
        try:
            yield threading.Semaphore(_slots(params, ray.cluster_resources()))
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


def check_address() -> None:
    """Raise UserError if ``RAY_ADDRESS`` is set and nothing listens there.

    Ray itself would try a dead address for over a minute, and then end the process.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"RAY_ADDRESS: found nothing that answers at '{address}' ({error}), expected a Ray cluster; start it, or"
            " unset RAY_ADDRESS to run here."
        ) from None


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
    """Give Ctrl-C its meaning back: Ray replaces the handler and leaves its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def on_workers(
    params: ClusterParams, work: Callable[..., Any], arguments: list[tuple[Any, ...]], room: threading.Semaphore
) -> Iterator[Any]:
    """Run ``work(*arguments[i])`` on the cluster, and yield the results as they come.

    Args:
        room: of the cluster. The caller holds one of it, for as many tasks at a time as a run has ranks. What nobody
            else holds, now or later, is taken as well until all is done.
    """
    import ray

    remote = ray.remote(num_cpus=params.threads, num_gpus=int(params.gpu), max_retries=params.max_failures)(work)
    left, taken = deque(arguments), 0
    waiting: list[Any] = []
    try:
        while left or waiting:
            while left:
                if len(waiting) == (1 + taken) * params.num_workers:
                    if not room.acquire(blocking=False):
                        break
                    taken += 1
                waiting.append(remote.remote(*left.popleft()))
            done, waiting = ray.wait(waiting)
            try:
                yield from ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, UserError) else error) from None
    finally:
        for _ in range(taken):
            room.release()


def train_on_workers(
    run: Run,
    store: Path,
    folder: Path,
    training_hash: str,
    flip: bool,
    description: Mapping[str, Any],
    params: ClusterParams,
) -> None:
    """Train a run with Ray Train: ``cluster.num_workers`` ranks, restarted up to ``max_failures`` times.

    Resuming is the training loop's own affair (its checkpoints lie in ``folder``), so Ray, whose run is named after
    the training hash, keeps none.

    Raises:
        UserError: the training loop's, or the workers failed too often.
    """
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import FailureConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    attempt = uuid.uuid4().hex

    resources: dict[str, float] = {"CPU": params.threads, **({"GPU": 1} if params.gpu else {})}
    trainer = TorchTrainer(
        worker,
        train_loop_config={
            "run": run.describe(),
            "store": str(store.resolve()),
            "folder": str(folder.resolve()),
            "training_hash": training_hash,
            "flip": flip,
            "description": dict(description),
            "threads": params.threads,
            "attempt": attempt,
        },
        scaling_config=ScalingConfig(
            num_workers=params.num_workers, use_gpu=params.gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=training_hash,
            storage_path=str((folder / "ray").resolve()),
            failure_config=FailureConfig(max_failures=params.max_failures, controller_failure_limit=3),
        ),
        torch_config=TorchConfig(backend="nccl" if params.gpu else "gloo"),
    )
    with restored_interrupt(), following(folder / LOG):
        try:
            trainer.fit()
        except TrainingFailedError as error:
            last = str(error).strip().splitlines()[-1]
            raise UserError(
                f"training: the workers of '{folder}' failed more than cluster.max_failures, {params.max_failures},"
                f" times, at last with '{last}'; run the same command again to go on from the newest checkpoint."
            ) from error
    mistakes = sorted(folder.glob(f"mistake-{attempt}-*.txt"))
    texts = [path.read_text() for path in mistakes]
    for path in mistakes:
        path.unlink()
    if texts:
        raise UserError(texts[0])


def worker(config: dict[str, Any]) -> None:
    """What every rank does."""
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    from dvdp.data.store import ImageStore
    from dvdp.evaluation.figures import grid, save_png
    from dvdp.training.loop import train

    torch.set_num_threads(config["threads"])
    folder = Path(config["folder"])

    def say(line: str) -> None:
        with (folder / LOG).open("a") as file:
            file.write(line + "\n")

    def preview(_: int, samples: torch.Tensor, path: Path) -> None:
        save_png(grid(samples), path)

    try:
        train(
            Run.from_description(config["run"]),
            ImageStore(Path(config["store"])),
            folder,
            config["training_hash"],
            flip=config["flip"],
            device=get_device(),
            description=config["description"],
            preview=preview,
            say=say,
        )
    except UserError as error:
        # Raised here, Ray would try again.
        name = f"mistake-{config['attempt']}-{get_context().get_world_rank()}.txt"
        write_atomically(folder / name, str(error))


@contextlib.contextmanager
def following(path: Path) -> Iterator[None]:
    """Print the lines that workers add to a file while the block runs."""
    done = threading.Event()
    start = path.stat().st_size if path.exists() else 0

    def follow() -> None:
        position = start
        while True:
            last = done.wait(0.5)
            if path.exists():
                with path.open() as file:
                    file.seek(position)
                    for line in file.readlines():
                        print(line, end="", flush=True)
                    position = file.tell()
            if last:
                return

    thread = threading.Thread(target=follow, name=f"following {path.parent.name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
