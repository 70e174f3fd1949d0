"""Sampling of a job on the cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dvdp.config import SamplingParams
from dvdp.data.store import ImageStore
from dvdp.diffusion.sampling import images_together
from dvdp.evaluation import figures
from dvdp.evaluation.samples import write_shard
from dvdp.files import write_atomically
from dvdp.models.export import TrainedModel, load_model
from dvdp.models.pixels import to_float
from dvdp.out_of_memory import in_batches
from dvdp.training.transfer import to_host
from pipelines.jobs.cluster import Held, on_worker, on_workers
from pipelines.jobs.device import worker_device
from pipelines.jobs.job import Job, Sampled
from pipelines.jobs.paths import DataPaths
from pipelines.jobs.train import LOG, following
from pipelines.logs import to_file

#: Images that a CPU draws at once, at most, so that there are some for each of its cores.
SHARD_IMAGES = 256
#: Sampler steps of the process picture, at most.
PICTURE_STEPS = 100


def sample_job(job: Sampled, held: Held) -> Path:
    """Draw ``sampling.count`` images from the EMA weights on the cluster; returns their folder.

    Shards that are there already are kept. Beside each lies ``<shard>.seconds``, what it took.

    Args:
        held: slots of the cluster, see :func:`pipelines.jobs.cluster.on_workers`.
    """
    params, work = job.params.cluster, missing_shards(job)
    places = str(job.weights.resolve()), str(job.samples.resolve())
    device, points = worker_device(params), job.run.turning_points
    start = partial(Sampler, *places, job.run.sampling, params.threads, device, points)
    left = sum(size for _, size in work)
    bar = tqdm(total=left, desc=f"sample {job.name}", unit="image", mininterval=1, disable=not work)
    with bar, following(job.folder / LOG):
        for drawn in on_workers(params, start, work, held):
            bar.update(drawn)
    return job.samples


def missing_shards(job: Sampled) -> list[tuple[int, int]]:
    """The first image and the number of images of each shard that is still to be drawn.

    On a GPU they fill the levels of low resolution; on a CPU they are a batch at most, so that all cores have some.
    Whatever lies there is kept, however it was divided.
    """
    sampling = job.run.sampling
    count, most = sampling.count, min(SHARD_IMAGES, sampling.batch)
    if job.params.cluster.gpu:
        most = images_together(len(job.run.turning_points), sampling.batch)
    there = {int(path.stem): images_in(path) for path in job.samples.glob("*.npy")}
    missing, first = [], 0
    while first < count:
        size = there.get(first, 0)
        if not size:
            size = min([most, count - first, *(start - first for start in there if start > first)])
            missing.append((first, size))
        first += size
    return missing


class Sampler:
    """Draws shards of images on a worker: one is written while the next is drawn."""

    def __init__(
        self,
        weights: str,
        folder: str,
        sampling: SamplingParams,
        threads: int,
        device: str,
        turning_points: tuple[int, ...] | None = None,
    ) -> None:
        torch.set_num_threads(threads)
        self._folder, self._model = Path(folder), load_model(weights, device, sampling, turning_points)
        warm_up(self._model)
        # When the last batch was there: a GPU begins with the next one then, and not when it is told to.
        self._there, self._arriving = 0.0, threading.Lock()
        self._most: int | None = None

    def __call__(self, first: int, count: int) -> Callable[[], int]:
        """Draw images number ``first`` on; what is returned writes them once they are there, and returns their number.

        What they took, by the clock between two calls, is written beside them. Where memory runs out, they are drawn
        in smaller parts, each with a file of its own, and so are those of later calls. What a worker wrote before it
        died, and could not report, is kept.
        """
        begun, end = time.perf_counter(), first + count
        while first < end and (kept := images_in(self._folder / f"{first:08d}.npy")):
            first += kept
        if first >= end:
            return lambda: count
        left, parts = end - first, []
        asked = min(left, self._most or left)

        def draw(start: int, size: int) -> tuple[int, Callable[[], Tensor]]:
            return size, to_host(self._model.draw(size, start))

        with to_file(self._folder.parents[1] / LOG):
            for part in in_batches(draw, first, end, asked, self._model.device, "sampling.batch"):
                parts.append(part)
        largest = max(size for _, (size, _) in parts)
        if largest < asked:
            self._most = largest

        def write() -> int:
            with self._arriving:
                drawn = [(start, images()) for start, (_, images) in parts]
                last, self._there = self._there, time.perf_counter()
                seconds = self._there - max(begun, last)
            for start, images in drawn:
                path = self._folder / f"{start:08d}.npy"
                write_atomically(path.with_suffix(".seconds"), str(seconds * len(images) / left))
                # Last: a shard that is there is complete.
                write_shard(path, images)
            return count

        return write


def warm_up(model: TrainedModel) -> None:
    """Draw once with a step at each level, as a GPU chooses and compiles its kernels at the first batch of a size."""
    sampling, levels = model.run.sampling, model.process.levels + 1
    options = {**sampling.options(), "steps": levels, "share": (1,) * levels}
    count = images_together(levels - 1, sampling.batch) if model.device.type == "cuda" else 1
    to_host(model.draw(count, options=options))()


def seconds_per_sample(job: Job) -> float:
    """Of sampling, on one worker, loading excluded."""
    paths = sorted(job.samples.glob("*.npy"))
    return sum(float(path.with_suffix(".seconds").read_text()) for path in paths) / sum(map(images_in, paths))


def draw_process(job: Job) -> Path:
    """An image of the data set on its way to noise, and a generated one on its way back, as one picture."""
    picture = job.folder / "pictures" / f"process-{job.sampling_hash}.png"
    if not picture.exists():
        store = DataPaths.of(job.params).store
        paths = (str(path.resolve()) for path in (job.weights, store, picture))
        params = job.params.cluster
        how = job.name, job.run.sampling, params.threads, worker_device(params), job.run.turning_points
        on_worker(params, draw_process_on_worker, *paths, *how)
    return picture


def draw_process_on_worker(
    weights: str,
    store: str,
    picture: str,
    title: str,
    sampling: SamplingParams,
    threads: int,
    device: str,
    turning_points: tuple[int, ...] | None = None,
) -> None:
    """The work of :func:`draw_process`."""
    torch.set_num_threads(threads)
    model = load_model(weights, device, sampling, turning_points)
    image, _ = ImageStore(Path(store))[0]
    times = figures.picture_times(model.process)
    forward = figures.diffused_states(model.process, to_float(torch.from_numpy(image)), times)
    back = figures.generated_states(
        model.process,
        model.denoiser,
        (3, model.resolution, model.resolution),
        times,
        # A picture needs no more, and full-size images take long.
        **sampling.options(min(sampling.steps, PICTURE_STEPS)),
        labels=model.labels(sampling.seed, 0, 1),
        device=model.device,
    )
    figures.save_png(figures.process_picture(model.process, forward, back, title), Path(picture))


def images_in(path: Path) -> int:
    """Number of images in a shard; 0 where there is none."""
    return len(np.load(path, mmap_mode="r", allow_pickle=False)) if path.exists() else 0
