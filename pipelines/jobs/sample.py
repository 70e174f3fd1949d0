"""Sampling of a job on the cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dvdp.config import ClusterParams, SamplingParams
from dvdp.data.store import ImageStore
from dvdp.evaluation import figures
from dvdp.evaluation.samples import write_shard
from dvdp.files import write_atomically
from dvdp.models.export import load_model
from dvdp.models.pixels import to_float
from dvdp.out_of_memory import in_batches
from dvdp.training.transfer import to_host
from pipelines.jobs.cluster import on_workers
from pipelines.jobs.job import Job, Sampled
from pipelines.jobs.paths import DataPaths
from pipelines.jobs.train import LOG, following
from pipelines.logs import to_file

#: Images in one task of a worker, at most, and so in one file of samples and in a batch.
SHARD_IMAGES = 256
#: Sampler steps of the process picture, at most.
PICTURE_STEPS = 100


def sample_job(job: Sampled, slots: threading.Semaphore) -> Path:
    """Draw ``sampling.count`` images from the EMA weights on the cluster; returns their folder.

    Shards that are there already are kept. Beside each lies ``<shard>.seconds``, what it took.

    Args:
        slots: of the cluster, see :func:`pipelines.jobs.cluster.on_workers`.
    """
    missing = missing_shards(job)
    places = str(job.weights.resolve()), str(job.samples.resolve())
    work = [(*places, first, size, job.run.sampling, job.params.cluster) for first, size in missing]
    left = sum(size for _, size in missing)
    bar = tqdm(total=left, desc=f"sample {job.name}", unit="image", mininterval=1, disable=not work)
    with bar, following(job.folder / LOG):
        for drawn in on_workers(job.params.cluster, sample_shard, work, slots):
            bar.update(drawn)
    return job.samples


def missing_shards(job: Sampled) -> list[tuple[int, int]]:
    """The first image and the number of images of each task that is still to be done.

    Whatever lies there is kept, however it was divided.
    """
    count = job.run.sampling.count
    # On a GPU a task is a new process, which takes seconds to start; small tasks keep all cores of a CPU busy.
    most = SHARD_IMAGES if job.params.cluster.gpu else min(SHARD_IMAGES, job.run.sampling.batch)
    there = {int(path.stem): images_in(path) for path in job.samples.glob("*.npy")}
    missing, first = [], 0
    while first < count:
        size = there.get(first, 0)
        if not size:
            size = min([most, count - first, *(start - first for start in there if start > first)])
            missing.append((first, size))
        first += size
    return missing


def sample_shard(
    weights: str, folder: str, first: int, count: int, sampling: SamplingParams, params: ClusterParams
) -> int:
    """Draw images number ``first`` on, each batch into a file of its own; returns their number.

    A batch is written while the next one is drawn. Where memory runs out, batches are halved.
    """
    torch.set_num_threads(params.threads)
    model = load_model(weights, "cuda" if params.gpu else "cpu", sampling)

    def draw(start: int, size: int) -> Callable[[], Tensor]:
        return to_host(model.draw(size, start))

    with ThreadPoolExecutor(max_workers=1) as writer, to_file(Path(folder).parents[1] / LOG):
        # Whatever it does says when the next batch was begun: its first task, now.
        writing = writer.submit(time.perf_counter)
        batches = in_batches(draw, first, first + count, sampling.batch, model.device, "sampling.batch")
        for start, images in batches:
            # One batch waits at most, and what went wrong with it ends the task.
            begun = writing.result()
            writing = writer.submit(_write_batch, Path(folder) / f"{start:08d}.npy", images, begun)
        writing.result()
    return count


def _write_batch(path: Path, images: Callable[[], Tensor], begun: float) -> float:
    """Write images once they are there; returns when that was, by the clock that says when they were begun."""
    drawn, there = images(), time.perf_counter()
    write_atomically(path.with_suffix(".seconds"), str(there - begun))
    # Last: a shard that is there is complete.
    write_shard(path, drawn)
    return there


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
        arguments = (*paths, job.name, job.run.sampling, job.params.cluster)
        list(on_workers(job.params.cluster, draw_process_on_worker, [arguments], threading.Semaphore(0)))
    return picture


def draw_process_on_worker(
    weights: str, store: str, picture: str, title: str, sampling: SamplingParams, params: ClusterParams
) -> None:
    """The work of :func:`draw_process`."""
    torch.set_num_threads(params.threads)
    model = load_model(weights, "cuda" if params.gpu else "cpu", sampling)
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
