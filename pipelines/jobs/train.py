"""Training of a job with Ray Train."""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dvdp.config import ClusterParams, Run
from dvdp.data.store import ImageStore
from dvdp.errors import UserError
from dvdp.files import locked, write_atomically
from dvdp.training.loop import is_finished
from pipelines.jobs.cluster import Held, restored_interrupt
from pipelines.jobs.device import write_machine
from pipelines.jobs.failures import ERRORS, Raised, explain, keep, killed_for_memory, take
from pipelines.jobs.job import Job
from pipelines.jobs.paths import DataPaths
from pipelines.logs import to_file

logger = logging.getLogger("dvdp.jobs")


def train_job(job: Job, description: Mapping[str, str], held: Held | None = None) -> Path:
    """Train to the end, unless that is done; returns the weights. Needs :func:`pipelines.jobs.cluster.cluster`.

    Args:
        held: slots that the caller holds for the ranks; there will be fewer of them if memory runs out.

    One at a time trains a run, in this process or another: whoever comes second waits, and finds it finished.
    """
    lock = job.folder / "driver.lock"
    with locked(lock, patience=0) as free:
        if not free:
            logger.info("%s: waiting for another process that trains the same run (%s)", job.name, lock)
    with locked(lock):
        if not is_finished(job.folder):
            store = ImageStore(DataPaths.of(job.params).store)
            about = {"training_hash": job.training_hash, **description, "run": job.run.describe()}
            write_atomically(job.folder / "run.json", json.dumps(about, indent=2) + "\n")
            train_on_workers(
                job.run,
                store.path,
                job.folder,
                job.training_hash,
                job.params.dataset.flip,
                {**description, **store.metadata.model_metadata(len(job.run.turning_points))},
                job.params.cluster,
                held,
            )
    return job.weights


#: File of a run's folder with the status lines of training.
LOG = "log.txt"
#: Seconds until another try where there was no memory for the last; another program may have taken it.
PAUSE = 20.0


def train_on_workers(
    run: Run,
    store: Path,
    folder: Path,
    training_hash: str,
    flip: bool,
    description: Mapping[str, Any],
    params: ClusterParams,
    held: Held | None = None,
) -> None:
    """Train a run with Ray Train: ``cluster.num_workers`` ranks, started again up to ``max_failures`` times.

    Resuming is the training loop's own affair: its checkpoints lie in ``folder``. When the machine's memory runs out
    there are fewer slots from then on, as long as there are others than those ``held``; a GPU is no run's but its own.

    Raises:
        UserError: the training loop's, or why training does not come to its end.
    """
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    start = run.training.start
    config = {
        "run": run.describe(),
        "store": str(store.resolve()),
        "folder": str(folder.resolve()),
        "training_hash": training_hash,
        "flip": flip,
        "description": dict(description),
        "start": None if start is None else str(Path(start).resolve()),
        "threads": params.threads,
        "gpu": params.gpu,
        "shard": params.shard,
        "devices": params.num_workers * (1 if params.gpu else params.threads),
    }
    failures = 0
    while True:
        attempt, killed = uuid.uuid4().hex, killed_for_memory()
        try:
            with restored_interrupt(), following(folder / LOG):
                _fit({**config, "attempt": attempt}, folder / "ray", params)
            return
        except (RayError, TrainingFailedError) as error:
            raised = take(list(folder.glob(f"failure-{attempt}-*.json")), folder)
            mistake = next((each.cause for each in raised if each.mistake), None)
            if mistake:
                raise UserError(mistake) from None
            failure = explain(error, raised, killed_for_memory() > killed)
            if not raised:
                keep(str(error), folder)
        what = f"{failure.text} (more in {folder / ERRORS})"
        if failure.memory and not failure.gpu and held is not None and held.fewer():
            logger.warning("%s: %s; it goes on with one run fewer at a time", run.setting, what)
            continue
        failures += 1
        if not failure.again or failures > params.max_failures:
            often = f"; this was failure {failures}, and cluster.max_failures is {params.max_failures}"
            raise UserError(
                f"training: {what}{often if failure.again else ''}; run the same command again to go on from the newest"
                " checkpoint."
            )
        logger.warning("%s: %s; it goes on from the newest checkpoint", run.setting, what)
        time.sleep(PAUSE if failure.memory else 0)


def _fit(config: dict[str, Any], storage: Path, params: ClusterParams) -> None:
    """Run :func:`worker` once on every rank, in a run of Ray's that is named after the training hash."""
    from ray.train import BackendConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.config import FailureConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from pipelines.jobs.process_group import GroupConfig

    resources: dict[str, float] = {"CPU": params.threads, **({"GPU": 1} if params.gpu else {})}
    # One rank needs no process group.
    alone = params.num_workers == 1
    DataParallelTrainer(
        worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=params.num_workers, use_gpu=params.gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=config["training_hash"],
            storage_path=str(storage.resolve()),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=3),
        ),
        backend_config=BackendConfig() if alone else GroupConfig(backend="nccl" if params.gpu else "gloo"),
    ).fit()


def worker(config: dict[str, Any]) -> None:
    """What every rank does."""
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    from dvdp.data.store import ImageStore
    from dvdp.evaluation.figures import grid, save_png
    from dvdp.training.loop import train

    torch.set_num_threads(config["threads"])
    folder, rank = Path(config["folder"]), get_context().get_world_rank()
    if rank == 0:
        write_machine(folder, config["gpu"], config["devices"])

    def preview(_: int, samples: torch.Tensor, path: Path) -> None:
        save_png(grid(samples), path)

    try:
        with to_file(folder / LOG):
            train(
                Run.from_description(config["run"]),
                ImageStore(Path(config["store"])),
                folder,
                config["training_hash"],
                flip=config["flip"],
                device=get_device(),
                description=config["description"],
                preview=preview,
                sharded=config["shard"],
                start=None if config["start"] is None else Path(config["start"]),
            )
    except Exception as error:
        Raised.of(error).write(folder / f"failure-{config['attempt']}-{rank}.json")
        raise


@contextlib.contextmanager
def following(path: Path) -> Iterator[None]:
    """Log the status lines that workers add to a file, while the block runs, as the caller's own."""
    done = threading.Event()
    start = path.stat().st_size if path.exists() else 0

    def follow() -> None:
        position = start
        while True:
            last = done.wait(0.5)
            if path.exists() and path.stat().st_size < position:
                position = 0  # It was full, and begun anew.
            if path.exists():
                with path.open("rb") as file:
                    file.seek(position)
                    # What has no end yet is read again.
                    *lines, rest = file.read().split(b"\n")
                    position = file.tell() - len(rest)
                for line in lines:
                    # It gets the time once more.
                    logger.info("%s", re.sub(r"^\d\d:\d\d:\d\d ", "", line.decode(errors="backslashreplace")))
            if last:
                return

    # Prefect knows by its context which task a line belongs to.
    context = contextvars.copy_context()
    name = f"following {path.parent.name}"
    thread = threading.Thread(target=context.run, args=(follow,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
