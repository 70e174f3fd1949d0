"""A few steps and samples of a setting in a process of their own, as a worker would do them: seconds and memory.

And the largest part of a step that fits: on a GPU by trying larger ones, on a CPU, where a process that takes too much
is ended with others beside it, counted from the peaks of smaller ones.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dvdp import hardware
from dvdp.config import Params, Run
from dvdp.errors import UserError
from dvdp.hardware import device_name

if TYPE_CHECKING:
    from dvdp.data.loading import Batch
    from dvdp.training.loop import Training

#: Bytes by which peaks must differ to tell anything: kernels that are compiled meanwhile take as much.
TELLING = 64 * 2**20


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
    part: int | None = None
    """Images of full size in a part of these steps: as the params say, or fewer where they do not fit."""
    largest_part: int | None = None
    """Images of full size in the largest part that fits; None in trials of older releases."""
    counted: bool = False
    """It was counted from the peaks of smaller parts, not tried."""


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
        # Here a part that does not fit must fail.
        run = replace(run, training=replace(run.training, batch_fit=False))
        training = untrained(run, images, ranks, device, Path(folder), flip)
        settings = training.run.training
        batches = to_device(
            training_batches(images, batch=settings.batch, seed=run.seed, flip=flip, workers=settings.loader_workers),
            device,
        )
        limit = None if gpu else hardware.memory() // ranks
        part, slope = first_part(training, batches, limit)
        step_seconds = training.time_steps(batches)
        training._checkpoint(0)
        memory = peak_memory(device) + (CONTEXT_GPU if gpu else RAY)
        seconds = sample_seconds(run, call_seconds(training))
        if limit is None:
            largest, counted = tried_part(training, batches, part), False
        else:
            largest = counted_part(training.run, part, memory, slope, limit)
            counted = largest != part
    return Trial(device_name(gpu), step_seconds, seconds, memory, part, largest, counted)


def first_part(training: Training, batches: Iterator[Batch], limit: int | None) -> tuple[int, float]:
    """Images of full size in parts that fit, at most as many as the params say; with steps in such parts done.

    Args:
        limit: bytes that the process may take, by count; None to try.

    Returns:
        The images, and the bytes that the peak grew by for each that is counted: 1 where nothing can be told.

    Raises:
        UserError: not even one image at a time fits.
    """
    from dvdp.training.estimate import peak_memory

    part, run = training.part_size.now, training.run
    while limit and part > 1 and _count(run, part) > limit:
        part = math.ceil(part / 2)
    if limit:
        peaks = {}
        # The smallest first: a peak never falls.
        for size in sorted({math.ceil(part / 4), math.ceil(part / 2), part}):
            _try(training, batches, size)
            peaks[size] = peak_memory(training.device)
        counted = _count(run, part) - _count(run, min(peaks))
        grown = peaks[part] - peaks[min(peaks)]
        return part, grown / counted if min(grown, counted) > TELLING else 1.0
    while not _try(training, batches, part):
        if part == 1:
            raise UserError(f"--trial: {run.setting} has no memory for one image at a time on {device_name(True)}.")
        part = math.ceil(part / 2)
    return part, 1.0


def tried_part(training: Training, batches: Iterator[Batch], part: int) -> int:
    """Images of full size in the largest part with which steps do not run out of memory; one of ``part`` fits."""
    batch = training.run.training.batch
    return math.ceil(batch / least(lambda n: _try(training, batches, math.ceil(batch / n)), math.ceil(batch / part)))


def counted_part(run: Run, part: int, memory: int, slope: float, limit: int) -> int:
    """The same, counted from the peak ``memory`` with parts of ``part`` images.

    Args:
        slope: see :func:`first_part`.
        limit: bytes that there are.
    """
    batch = run.training.batch

    def fits(accumulation: int) -> bool:
        more = _count(run, math.ceil(batch / accumulation)) - _count(run, part)
        return memory + slope * more <= limit

    return math.ceil(batch / least(fits, math.ceil(batch / part)))


def least(holds: Callable[[int], bool], known: int) -> int:
    """The least of 1 .. ``known`` for which something holds that holds for all above it, and for ``known``."""
    return bisect_left(range(known + 1), True, lo=1, hi=known, key=holds)


def _try(training: Training, batches: Iterator[Batch], part: int) -> bool:
    """Whether steps of each kind fit into memory in parts of so many images of full size."""
    from dvdp.out_of_memory import ran_out, release

    training.part_size.start_with(part)
    try:
        for _, counts in training.step_kinds():
            training.idle_step(batches, counts)
    except Exception as error:
        if not ran_out(error):
            raise
    else:
        return True
    training.computing.zero_grad()
    release()
    return False


def _count(run: Run, part: int) -> int:
    """Bytes of a worker on a CPU in such parts; ``run`` has its share of the batch."""
    from dvdp.training.memory import worker_memory
    from dvdp.training.shortage import cut_to

    return worker_memory(cut_to(run, 1, part), 1, gpu=False)


def main() -> None:
    """Settings from standard input, the trial to standard output."""
    settings = json.loads(sys.stdin.read())
    run, store = Run.from_description(settings.pop("run")), settings.pop("store")
    print(json.dumps(asdict(measure(run, store=Path(store) if store else None, **settings))))


if __name__ == "__main__":
    main()
