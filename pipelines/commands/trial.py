"""A few steps and samples of a setting in a process of their own, as a worker would do them: seconds and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from dvdp.config import Params, Run
from dvdp.errors import UserError
from dvdp.hardware import device_name


@dataclass(frozen=True)
class Trial:
    """What was measured."""

    device: str
    step_seconds: float
    """Of a training step, the mean over the levels' shares."""
    sample_seconds: float
    """Of an image, with the NFE of the params."""
    memory_bytes: int
    """Peak of a training worker: of its GPU, else of its process, Ray's part added."""


def trial_of(run: Run, params: Params, store: Path) -> Trial:
    """Try a setting as one rank of it would run, in a new process with a worker's environment.

    Args:
        store: of the prepared images; where there is none, random ones are taken.

    Raises:
        UserError: the process failed, as for lack of memory.
    """
    from pipelines.jobs.cluster import WORKER_ENVIRONMENT

    settings = {
        "run": run.describe(),
        "ranks": params.cluster.num_workers,
        "threads": params.cluster.threads,
        "gpu": params.cluster.gpu,
        "flip": params.dataset.flip,
        "store": str(store) if store.is_dir() else None,
    }
    environment = {**os.environ, **WORKER_ENVIRONMENT, "OMP_NUM_THREADS": str(params.cluster.threads)}
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.commands.trial"],
        input=json.dumps(settings),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it was killed, often for lack of memory"])[-1]
        raise UserError(f"--trial: the trial of {run.setting} failed ({last}); run `dvdp check` without it.")
    return Trial(**json.loads(done.stdout.splitlines()[-1]))


def measure(run: Run, ranks: int, threads: int, gpu: bool, flip: bool, store: Path | None) -> Trial:
    """In this process, which should have done nothing else, as its peak of memory counts."""
    import numpy as np
    import torch

    from dvdp.data.loading import ArrayImages, Images, training_batches
    from dvdp.data.store import ImageStore
    from dvdp.training.estimate import peak_memory
    from dvdp.training.memory import CONTEXT_GPU, RAY
    from dvdp.training.transfer import to_device
    from pipelines.jobs.timing import call_seconds, sample_seconds, untrained

    torch.set_num_threads(threads)
    device = torch.device("cuda" if gpu else "cpu")
    random = np.random.default_rng(0)
    images: Images = (
        ImageStore(store)
        if store
        else ArrayImages(
            random.integers(0, 256, (64, 3, run.resolution, run.resolution), dtype=np.uint8),
            random.integers(0, max(1, run.model.num_classes), 64),
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        training = untrained(run, images, ranks, device, Path(folder), flip)
        settings = training.run.training
        batches = training_batches(
            images, batch=settings.batch, seed=run.seed, flip=flip, workers=settings.loader_workers
        )
        step_seconds = training.time_steps(to_device(batches, device))
        training._checkpoint(0)
    memory = peak_memory(device) + (CONTEXT_GPU if gpu else RAY)
    return Trial(device_name(gpu), step_seconds, sample_seconds(run, call_seconds(training)), memory)


def main() -> None:
    """Settings from standard input, the trial to standard output."""
    settings = json.loads(sys.stdin.read())
    run, store = Run.from_description(settings.pop("run")), settings.pop("store")
    print(json.dumps(asdict(measure(run, store=Path(store) if store else None, **settings))))


if __name__ == "__main__":
    main()
