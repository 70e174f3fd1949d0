"""The steps of the pipeline as plain functions: every one can be run again alone and finds what is done already.

They know Ray (through :mod:`pipelines.cluster`) but neither Prefect nor MLflow, where only turning points that are
``auto`` are looked up (by :mod:`pipelines.plan`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dvdp.config import ClusterParams, Params, Run, SamplingParams
from dvdp.data.prepare import prepare
from dvdp.data.store import ImageStore
from dvdp.data.verify import verify
from dvdp.errors import UserError
from dvdp.evaluation import figures
from dvdp.evaluation.extractors import Extractor, inception_extractor, load_extractor, train_extractor
from dvdp.evaluation.published import read_statistics
from dvdp.evaluation.scores import (
    ScoreRecord,
    export_statistics,
    make_reference,
    read_reference,
    score,
    score_published,
    write_shard,
)
from dvdp.files import locked, write_atomically
from dvdp.identity import evaluation_hash, sampling_hash, training_hash
from dvdp.models.export import load_model
from dvdp.pixels import to_float
from dvdp.randomness import image_labels
from dvdp.training.loop import is_finished
from dvdp.transfer import to_host
from pipelines.cluster import on_workers, train_on_workers
from pipelines.places import Places


def prepare_data(params: Params) -> None:
    """DVC stage ``prepare``: raw images to LMDB."""
    places = Places.of(params)
    metadata = prepare(params.dataset, places.store, places.data / "prepare.json")
    left_out = f"{metadata.skipped} skipped" + (f", {metadata.duplicates} duplicates" if metadata.duplicates else "")
    print(f"{metadata.count:,} images of {metadata.resolution} px in {places.store}, {left_out}")


def verify_data(params: Params) -> str:
    """Check every image of the prepared data set; one line for people, or a UserError that names the damaged ones."""
    store = Places.of(params).store
    metadata = verify(store, max(1, params.dataset.workers))
    return f"{metadata.count:,} images in {store} are as they were prepared, digest {metadata.digest}"


def describe_data(params: Params) -> str:
    """The prepared data set in numbers, for people."""
    metadata = ImageStore(Places.of(params).store).metadata
    encoding = metadata.encoding + (f" of quality {metadata.jpeg_quality}" if metadata.jpeg_quality else "")
    labels = [*zip(metadata.labels, metadata.label_counts, strict=False), ("none", metadata.label_counts[-1])]
    numbers = {
        "data set": f"{metadata.name}, from {metadata.source}, digest {metadata.digest}",
        "images": f"{metadata.count:,} of {metadata.resolution} px",
        "left out": f"{metadata.skipped:,} unreadable, {metadata.duplicates:,} duplicates",
        "stored as": f"{encoding}, {sum(metadata.shard_bytes):,} bytes, files: {len(metadata.shard_bytes)}",
        "labels": ", ".join(f"{label} {count:,}" for label, count in labels if count),
        # Of images in [-1, 1], as networks see them.
        "mean": ", ".join(f"{name} {x:.4f}" for name, x in zip(("red", "green", "blue"), metadata.means, strict=True)),
        "deviation": ", ".join(f"band {i} {x:.4f}" for i, x in enumerate(metadata.detail_deviations)),
        "of levels": ", ".join(f"level {i} {x:.4f}" for i, x in enumerate(metadata.level_deviations)),
    }
    return "\n".join(f"{name:<10} {text}" for name, text in numbers.items() if text)


#: Images of a data set's contact sheet, at most, and how many pixels each is wide, at most.
SHEET_IMAGES, SHEET_SIDE = 64, 256


def data_sheet(params: Params, out: Path) -> Path:
    """A picture of images from all over the prepared data set."""
    store = ImageStore(Places.of(params).store)
    chosen = np.unique(np.linspace(0, len(store) - 1, SHEET_IMAGES).round().astype(int)).tolist()
    shrink = math.ceil(store.metadata.resolution / SHEET_SIDE)
    tiles = [Image.fromarray(store[index][0].transpose(1, 2, 0)).reduce(shrink) for index in chosen]
    return figures.save_png(figures.grid(np.stack([np.asarray(tile).transpose(2, 0, 1) for tile in tiles])), out)


def make_extractor(params: Params) -> None:
    """DVC stage ``extractor``: train the network that scores are made with (Inception needs no training)."""
    places = Places.of(params)
    if params.evaluation.extractor == "inception":
        places.extractor.mkdir(parents=True, exist_ok=True)
        inception_extractor(params.evaluation.inception_weights)
        return
    store = ImageStore(places.store)
    info = train_extractor(
        store,
        params.evaluation.extractor,
        params.evaluation.extractor_epochs,
        store.metadata.digest,
        places.extractor,
    )
    print(f"extractor: {info.task}, {100 * info.accuracy:.1f} % right on images held out")


def make_references(params: Params) -> None:
    """DVC stage ``reference``: features of the real images."""
    places = Places.of(params)
    store = ImageStore(places.store)
    reference = make_reference(
        store,
        store.metadata.digest,
        extractor_of(params),
        places.reference,
        params.evaluation.kid_subset,
        _gpu_here(params),
    )
    print(f"reference: {reference.count:,} images; two real halves score {reference.anchors['halves']['metrics']}")


def export_references(params: Params, out: Path) -> None:
    """The reference that is there, as an ``.npz`` file for others."""
    export_statistics(Places.of(params).reference, out)
    print(f"reference: mean and covariance of the features of {params.dataset.name} in {out}")


def extractor_of(params: Params) -> Extractor:
    """The extractor that ``evaluation`` asks for."""
    if params.evaluation.extractor == "inception":
        return inception_extractor(params.evaluation.inception_weights)
    return load_extractor(Places.of(params).extractor)


#: Images in one task of a worker, at most, and so in one file of samples and in a batch.
SHARD_IMAGES = 256
#: Sampler steps of the process picture, at most.
PICTURE_STEPS = 100


def _gpu_here(params: Params) -> bool:
    # Scores are made in this process, which may be on a machine without the workers' GPUs.
    return params.cluster.gpu and torch.cuda.is_available()


@dataclass(frozen=True)
class Sampled(ABC):
    """What images are drawn from and scored, with the places of all that is made: a job, or a registered model."""

    params: Params
    run: Run

    @property
    @abstractmethod
    def name(self) -> str:
        """For people."""

    @property
    @abstractmethod
    def trained(self) -> str:
        """Names the weights."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Of weights, samples and scores."""

    @property
    def weights(self) -> Path:
        """The trained model."""
        return self.folder / "weights.safetensors"

    @property
    def sampling_hash(self) -> str:
        """Names the samples."""
        return sampling_hash(self.run, self.trained)

    @property
    def samples(self) -> Path:
        """Folder of the samples, ``<first image>.npy``."""
        return self.folder / "samples" / self.sampling_hash

    def score_path(self, reference: str) -> Path:
        """The score record against a reference, by its name."""
        name = evaluation_hash(self.params.evaluation, self.sampling_hash, reference)
        return self.folder / "scores" / f"{name}.json"


@dataclass(frozen=True)
class Job(Sampled):
    """One setting and seed on one data set, with the names of all it makes."""

    dataset_digest: str

    @cached_property
    def training_hash(self) -> str:
        """Names the run; see :mod:`dvdp.identity`."""
        return training_hash(self.run, self.dataset_digest, self.params.dataset.flip, self.params.cluster.num_workers)

    @property
    def trained(self) -> str:
        """The training hash."""
        return self.training_hash

    @property
    def name(self) -> str:
        """The setting, and the seed where there are several."""
        return self.run.setting if len(self.params.seeds) == 1 else f"{self.run.setting}-seed{self.run.seed}"

    @property
    def folder(self) -> Path:
        """The run's."""
        return self.params.cluster.storage / self.training_hash


def jobs(params: Params) -> list[Job]:
    """Every setting with every seed, on the prepared data set.

    Turning points that are ``auto`` are chosen here, for the jobs and their params.

    Raises:
        UserError: the data set is not prepared, or was prepared with another resolution; a batch does not divide
            over the ranks; turning points cannot be chosen.
    """
    store = ImageStore(Places.of(params).store)
    if store.metadata.resolution != params.dataset.resolution:
        raise UserError(
            f"dataset.resolution: found {params.dataset.resolution}, expected {store.metadata.resolution} as in"
            f" {Places.of(params).store}; prepare the data set again."
        )
    if any(isinstance(setting.turning_points, str) for setting in params.settings):
        # Looks into MLflow, unlike everything else here, and is not needed otherwise.
        from pipelines.plan import choose_turning_points

        params = choose_turning_points(params, store.metadata)
    runs, ranks, classes = params.runs(), params.cluster.num_workers, len(store.metadata.labels)
    for run in runs:
        if run.model.classes not in (0, classes):
            known = f"0, or {classes} as in" if classes else "0, as there are no labels in"
            raise UserError(
                f"model.classes: found {run.model.classes} for {run.setting}, expected {known}"
                f" {Places.of(params).store}; change it."
            )
        if run.training.batch % ranks:
            raise UserError(
                f"training.batch: found {run.training.batch} for {run.setting}, expected a multiple of"
                f" cluster.num_workers, {ranks}; change one of them."
            )
    return [Job(params, run, store.metadata.digest) for run in runs]


def check_scorable(params: Params) -> None:
    """Raise UserError now for what scoring would miss after all training: extractor or reference."""
    places = Places.of(params)
    extractor, reference = extractor_of(params), read_reference(places.reference)
    digest = ImageStore(places.store).metadata.digest
    if (reference.extractor_sha256, reference.data_digest) != (extractor.sha256, digest):
        raise UserError(
            f"reference: found '{places.reference}' made with another extractor or data set, expected the extractor"
            f" '{extractor.name}' and '{places.store}' as they are now; run `dvdp reference` again."
        )
    if params.evaluation.kid_subset > reference.count:
        raise UserError(
            f"evaluation.kid_subset: found {params.evaluation.kid_subset}, expected at most the {reference.count}"
            " images of the data set; take smaller subsets."
        )


def train_job(job: Job, description: Mapping[str, str]) -> Path:
    """Train to the end, unless that is done; returns the weights. Needs :func:`pipelines.cluster.cluster`.

    One at a time trains a run, in this process or another: whoever comes second waits, and finds it finished.
    """
    lock = job.folder / "driver.lock"
    with locked(lock, patience=0) as free:
        if not free:
            print(f"{job.name}: waiting for another process that trains the same run ({lock})")
    with locked(lock):
        if not is_finished(job.folder):
            store = ImageStore(Places.of(job.params).store)
            about = {"training_hash": job.training_hash, **description, "run": job.run.describe()}
            write_atomically(job.folder / "run.json", json.dumps(about, indent=2) + "\n")
            train_on_workers(
                job.run,
                store.path,
                job.folder,
                job.training_hash,
                job.params.dataset.flip,
                {**description, **store.metadata.told(len(job.run.turning_points))},
                job.params.cluster,
            )
    return job.weights


def sample_job(job: Sampled, room: threading.Semaphore) -> Path:
    """Draw ``sampling.count`` images from the EMA weights on the cluster; returns their folder.

    Shards that are there already are kept. Beside each lies ``<shard>.seconds``, what it took.

    Args:
        room: of the cluster, see :func:`pipelines.cluster.on_workers`.
    """
    missing = missing_shards(job)
    places = str(job.weights.resolve()), str(job.samples.resolve())
    work = [(*places, first, size, job.run.sampling, job.params.cluster) for first, size in missing]
    left = sum(size for _, size in missing)
    with tqdm(total=left, desc=f"sample {job.name}", unit="image", mininterval=1, disable=not work) as bar:
        for drawn in on_workers(job.params.cluster, sample_shard, work, room):
            bar.update(drawn)
    return job.samples


def missing_shards(job: Sampled) -> list[tuple[int, int]]:
    """The first image and the number of images of each task that is still to be done.

    Whatever lies there is kept, however it was divided.
    """
    count = job.run.sampling.count
    # On a GPU a task is a new process, which takes seconds to start; small tasks keep all cores of a CPU busy.
    most = SHARD_IMAGES if job.params.cluster.gpu else min(SHARD_IMAGES, job.run.sampling.batch)
    there = {int(path.stem): _images_in(path) for path in job.samples.glob("*.npy")}
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

    A batch is written while the next one is drawn.
    """
    torch.set_num_threads(params.threads)
    model = load_model(weights, "cuda" if params.gpu else "cpu", sampling)
    end = first + count
    with ThreadPoolExecutor(max_workers=1) as writer:
        # Whatever it does says when the next batch was begun: its first task, now.
        writing = writer.submit(time.perf_counter)
        for start in range(first, end, sampling.batch):
            images = to_host(model.draw(min(sampling.batch, end - start), start))
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
    return sum(float(path.with_suffix(".seconds").read_text()) for path in paths) / sum(map(_images_in, paths))


def draw_process(job: Job) -> Path:
    """An image of the data set on its way to noise, and a generated one on its way back, as one picture."""
    picture = job.folder / "pictures" / f"process-{job.sampling_hash}.png"
    if not picture.exists():
        store = Places.of(job.params).store
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
        (3, model.side, model.side),
        times,
        # A picture needs no more, and full-size images take long.
        **sampling.options(min(sampling.steps, PICTURE_STEPS)),
        lift_deviations=model.lift_deviations,
        labels=image_labels(model.label_counts, sampling.seed, 0, 1),
        device=model.device,
    )
    figures.save_png(figures.process_picture(model.process, forward, back, title), Path(picture))


def _images_in(path: Path) -> int:
    return len(np.load(path, mmap_mode="r", allow_pickle=False)) if path.exists() else 0


def score_job(job: Sampled, statistics: Path | None = None, remarks: Sequence[str] = ()) -> ScoreRecord:
    """Score the samples against the reference, unless that is done.

    Args:
        statistics: an ``.npz`` file to score against in place of the reference.
        remarks: to keep among the record's warnings.
    """
    places, evaluation, gpu = Places.of(job.params), job.params.evaluation, _gpu_here(job.params)
    extractor = extractor_of(job.params)
    published = None if statistics is None else read_statistics(statistics, extractor.features)
    path = job.score_path(published.digest if published else read_reference(places.reference).cache_name)
    if path.exists():
        return ScoreRecord.from_json(path.read_text(), str(path))
    how = _how(job.run)
    if published:
        record = score_published(job.samples, published, extractor, evaluation.samples, how, gpu)
    else:
        record = score(job.samples, places.reference, extractor, evaluation.samples, evaluation.kid_subset, how, gpu)
    record = dataclasses.replace(record, warnings=[*record.warnings, *remarks])
    write_atomically(path, record.to_json())
    return record


def _how(run: Run) -> dict[str, Any]:
    """Where samples come from, for their record."""
    return {
        **run.sampling.options(),
        "lift": run.sampling.lift,
        "classes": run.model.classes,
        "ema_halflife_images": run.training.ema_halflife_images,
        "ema_ramp": run.training.ema_ramp,
    }
