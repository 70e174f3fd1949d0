"""How fast settings train and sample, measured after all work so that none is slowed by another.

What a run takes while others run beside it says little of a speed-up. So all settings of a comparison are timed once
more by one worker when nothing else of theirs is left to do: a step of training and calls of the network at each level,
turn by turn. Of each step and call the least of all turns counts, as other work on the machine only ever adds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path

import torch

from dvdp.config import ClusterParams, Run
from dvdp.data.loading import ArrayImages, Batch, Images
from dvdp.diffusion.sampling import Progress
from dvdp.diffusion.timesteps import share_steps
from dvdp.files import write_atomically
from dvdp.hardware import device_name
from dvdp.models.flops import training_shares
from dvdp.out_of_memory import in_batches
from dvdp.training.estimate import clock
from dvdp.training.loop import Training
from pipelines.jobs.cluster import on_worker
from pipelines.jobs.device import worker_device
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
    """Of an image, in batches of ``sampling.batch`` at every level, but at most 16 images on a CPU."""


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
    timings = on_worker(params, time_on_worker, [job.run for job in first.values()], params, worker_device(params))
    for job in jobs:
        measured = timings[list(first).index(job.run.setting)]
        write_atomically(_path(job), json.dumps(asdict(measured)) + "\n")


def timing(job: Job) -> Timing | None:
    """What was measured of the job's setting, if anything was."""
    path = _path(job)
    return Timing(**json.loads(path.read_text())) if path.is_file() else None


def _path(job: Job) -> Path:
    return job.folder / f"timing-{job.sampling_hash}.json"


def time_on_worker(runs: Sequence[Run], params: ClusterParams, on: str) -> list[Timing]:
    """Timings of some settings, turn by turn; one of them is in memory at a time."""
    torch.set_num_threads(params.threads)
    device = torch.device(on)
    turns: list[list[tuple[list[float], list[float]]]] = [[] for _ in runs]
    begun = clock(device)
    for _ in range(TURNS):
        for run, found in zip(runs, turns, strict=True):
            # How fast a setting is does not depend on what it knows.
            zeros = torch.zeros((1, 3, run.resolution, run.resolution), dtype=torch.uint8).numpy()
            training = untrained(run, ArrayImages(zeros), params.num_workers, device)
            found.append((step_seconds(training), call_seconds(training)))
        if clock(device) - begun > SECONDS * len(runs):
            break
    name = device_name(device.type == "cuda")
    return [Timing(name, *_seconds(run, found)) for run, found in zip(runs, turns, strict=True)]


def _seconds(run: Run, turns: Sequence[tuple[list[float], list[float]]]) -> tuple[float, float]:
    """Of a training step and of a sample, from the least of what each part took."""
    steps, calls = ([min(times) for times in zip(*part, strict=True)] for part in zip(*turns, strict=True))
    shares = [1.0] if run.training.levels == "all" else training_shares(run)
    return sum(share * each for share, each in zip(shares, steps, strict=True)), sample_seconds(run, calls)


def untrained(
    run: Run, images: Images, ranks: int, device: torch.device, folder: Path = Path(), flip: bool = False
) -> Training:
    """One rank's part of a setting at its first step."""
    groups = run.training.groups_on(ranks) // ranks
    settings = replace(run.training, batch=run.training.batch // ranks, groups=groups)
    # No data is known to lift with.
    run = replace(run, training=settings, sampling=replace(run.sampling, lift="noise"))
    about = {"label_counts": [1] * run.model.num_classes + [0]}
    return Training(run, images, folder, "timing", flip, device, None, about)


def step_seconds(training: Training) -> list[float]:
    """Of a training step, at each level where a step has one, finest first: the second of two."""
    batch, side = training.run.training.batch, training.run.resolution
    images = Batch(torch.zeros((batch, 3, side, side), dtype=torch.uint8), torch.full((batch,), -1))
    found = []
    for _, counts in training.step_kinds():
        for _ in range(2):
            begun = clock(training.device)
            training.idle_step(repeat(images), counts)
            seconds = clock(training.device) - begun
        found.append(seconds)
    return found


def call_seconds(training: Training) -> list[float]:
    """Of a network call in sampling, an image, at each level, finest first: the least of a few."""
    run, device, levels = training.run, training.device, training.process.levels + 1
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

    def draw(_: int, images: int) -> int:
        nonlocal last
        found[:] = [[] for _ in found]
        for _ in range(2):
            last = clock(device)
            training.model.draw(images, options=options, callback=seen)
        return images

    # As many as sampling draws at once where memory is short.
    _, count = next(in_batches(draw, 0, count, count, device, "sampling.batch"))
    return [min(times) / count for times in found]


def sample_seconds(run: Run, calls: Sequence[float]) -> float:
    """Of an image, from the seconds of a network call at each level."""
    sampling = run.sampling
    numbers = share_steps(run.build_schedule(), sampling.steps, sampling.timestep_spacing, sampling.share)
    return sum(number * each for number, each in zip(numbers, calls, strict=True))
