"""How fast settings train and sample, measured after all work so that none is slowed by another.

What a run takes while others run beside it says little of a speed-up. So all settings of a comparison are timed once
more by one worker when nothing else of theirs is left to do: a step of training and calls of the network at each level,
turn by turn. Of each step and call the least of all turns counts, as other work on the machine only ever adds.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from dvdp.config import ClusterParams, Run
from dvdp.data.loading import ArrayImages
from dvdp.diffusion.sampling import Progress
from dvdp.diffusion.timesteps import share_steps
from dvdp.files import write_atomically
from dvdp.training.estimate import clock
from dvdp.training.levels import level_counts
from dvdp.training.loop import Training
from pipelines.jobs.cluster import on_workers
from pipelines.jobs.job import Job

#: Turns at most; no other begins once a setting has taken so many seconds.
TURNS, SECONDS = 5, 8.0
#: Images of a draw on a CPU, at most; and network calls at each level.
SAMPLE_IMAGES, CALLS = 16, 2


@dataclass(frozen=True)
class Timing:
    """What one worker takes for a setting, with nothing beside it."""

    device: str
    seconds_per_step: float
    """Of training, for the worker's part of the batch; reading of images and exchange of gradients are left out."""
    seconds_per_sample: float
    """Of an image, in batches as they are drawn, but at most 16 images on a CPU."""


def time_settings(jobs: Sequence[Job]) -> None:
    """Time all settings on the cluster unless they were, together or on the same device; see :func:`timing`.

    Raises:
        UserError: the work's, or why it could not be done.
    """
    found = [timing(job) for job in jobs]
    if all(found) and len({each.device for each in found if each}) == 1:
        return
    first = {job.run.setting: job for job in reversed(jobs)}
    params = jobs[0].params.cluster
    arguments = [job.run for job in first.values()], params
    (timings,) = on_workers(params, time_on_worker, [arguments], threading.Semaphore(0))
    for job in jobs:
        measured = timings[list(first).index(job.run.setting)]
        write_atomically(_path(job), json.dumps(asdict(measured)) + "\n")


def timing(job: Job) -> Timing | None:
    """What was measured of the job's setting, if anything was."""
    path = _path(job)
    return Timing(**json.loads(path.read_text())) if path.is_file() else None


def _path(job: Job) -> Path:
    return job.folder / f"timing-{job.sampling_hash}.json"


def time_on_worker(runs: Sequence[Run], params: ClusterParams) -> list[Timing]:
    """Timings of some settings, turn by turn; one of them is in memory at a time."""
    torch.set_num_threads(params.threads)
    device = torch.device("cuda" if params.gpu else "cpu")
    name = torch.cuda.get_device_name() if params.gpu else "cpu"
    runs = [
        replace(run, training=replace(run.training, batch=run.training.batch // params.num_workers)) for run in runs
    ]
    turns: list[list[tuple[list[float], list[float]]]] = [[] for _ in runs]
    begun = clock(device)
    for _ in range(TURNS):
        for run, found in zip(runs, turns, strict=True):
            training = untrained(run, device)
            found.append((step_seconds(training, device), call_seconds(training, device)))
        if clock(device) - begun > SECONDS * len(runs):
            break
    return [Timing(name, *_seconds(run, found)) for run, found in zip(runs, turns, strict=True)]


def _seconds(run: Run, turns: Sequence[tuple[list[float], list[float]]]) -> tuple[float, float]:
    """Of a training step and of a sample, from the least of what each part took."""
    steps, calls = ([min(times) for times in zip(*part, strict=True)] for part in zip(*turns, strict=True))
    schedule, sampling = run.build_schedule(), run.sampling
    shares = [1.0] if run.training.levels == "all" else schedule.shares()
    numbers = share_steps(schedule, sampling.steps, sampling.timestep_spacing, sampling.share)
    return _product(shares, steps), _product(numbers, calls)


def _product(numbers: Sequence[float], seconds: Sequence[float]) -> float:
    return sum(number * each for number, each in zip(numbers, seconds, strict=True))


def untrained(run: Run, device: torch.device) -> Training:
    """A setting at its first step, on one image of zeros: how fast it is does not depend on what it knows."""
    # There is no data to lift with.
    run = replace(run, sampling=replace(run.sampling, lift="noise"))
    zeros = torch.zeros((1, 3, run.resolution, run.resolution), dtype=torch.uint8).numpy()
    about = {"label_counts": [1] * run.model.num_classes + [0]}
    return Training(run, ArrayImages(zeros), Path(), "timing", False, device, None, about)


def step_seconds(training: Training, device: torch.device) -> list[float]:
    """Of a training step, at each level where a step has one, finest first: the second of two."""
    settings, schedule = training.run.training, training.process.schedule
    images = torch.zeros((settings.batch, 3, training.run.resolution, training.run.resolution), dtype=torch.uint8)
    labels = torch.full((settings.batch,), -1)
    levels = range(training.process.levels + 1)
    if settings.levels == "all":
        kinds = [level_counts(schedule, "all", training.run.seed, 0, images=settings.batch)]
    else:
        kinds = [[settings.batch if k == level else 0 for k in levels] for level in levels]
    training.learning_rate = 0.0
    found = []
    for counts in kinds:
        for _ in range(2):
            begun = clock(device)
            training.update(images, counts, labels)
            training.ema.update(settings.batch, settings.batch)
            seconds = clock(device) - begun
        found.append(seconds)
    return found


def call_seconds(training: Training, device: torch.device) -> list[float]:
    """Of a network call in sampling, an image, at each level, finest first: the least of a few."""
    run, levels = training.run, training.process.levels + 1
    count = run.sampling.batch if device.type == "cuda" else min(run.sampling.batch, SAMPLE_IMAGES)
    spans = map(training.process.schedule.span, range(levels))
    share = tuple(min(CALLS, high - low) for low, high in spans)
    options = {**run.sampling.options(), "steps": sum(share), "share": share}
    found: list[list[float]] = [[] for _ in range(levels)]
    last = 0.0

    def seen(progress: Progress) -> None:
        nonlocal last
        found[progress.level].append(clock(device) - last)
        last = clock(device)

    for _ in range(2):
        last = clock(device)
        training.model.draw(count, options=options, callback=seen)
    return [min(times) / count for times in found]
