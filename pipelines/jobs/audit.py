"""``dvdp audit``: which level, which lift or the solver costs a trained setting its score.

A run's folder keeps ``audits/<hash>.json``, the result, beside it its chart, and in a folder of what was drawn (images
from every start, in shards, and the states of free-running ones) whatever a stopped audit goes on with.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from dvdp import tensors
from dvdp.audit.figure import draw_audit
from dvdp.audit.result import FREE, REAL, SOLVER, Audit, Score, solver_sampling, starts
from dvdp.audit.run import check_count, conclude, draw, score_images
from dvdp.audit.states import States, Subject, join
from dvdp.config import ClusterParams, SamplingParams
from dvdp.data.store import ImageStore
from dvdp.diffusion.timesteps import share_steps
from dvdp.errors import UserError
from dvdp.evaluation.extractors import Extractor
from dvdp.evaluation.reference import Reference, measure, read_features, read_reference
from dvdp.evaluation.samples import SampleShards, write_shard
from dvdp.files import write_atomically
from dvdp.identity import audit_draws_hash, audit_hash
from dvdp.models.export import load_model
from dvdp.training.loop import is_finished
from pipelines.jobs.cluster import cluster, on_workers
from pipelines.jobs.job import Job
from pipelines.jobs.paths import DataPaths
from pipelines.jobs.sample import SHARD_IMAGES, images_in
from pipelines.jobs.score import check_scorable, extractor_of

KIND = "dvdp audited states 1"


@dataclass(frozen=True)
class AuditJob:
    """An audit of one setting and seed, with the names of all it makes."""

    job: Job
    images: int
    """Behind every score."""
    solver: dict[str, Any] | None
    """The sampling that the solver is compared with; None if it is the setting's own."""
    reference: Reference

    @cached_property
    def draws(self) -> Path:
        """Folder of what is drawn: images do not depend on how many are asked for."""
        return self.job.folder / "audits" / audit_draws_hash(self.job.sampling_hash)

    @cached_property
    def result(self) -> Path:
        """The audit."""
        name = audit_hash(self.draws.name, self.images, self.solver, self.reference.sha256)
        return self.job.folder / "audits" / f"{name}.json"

    @property
    def chart(self) -> Path:
        """Its picture."""
        return self.result.with_suffix(".png")

    @property
    def starts(self) -> list[str]:
        """Of all images to draw and score."""
        levels = len(self.job.run.turning_points)
        return [*starts(levels), REAL, *([SOLVER] if self.solver is not None else [])]

    def folder(self, start: str) -> Path:
        """Of the images from a start, ``<first image>.npy``; another solver is another folder."""
        steps = f"-{self.solver['steps']}" if start == SOLVER and self.solver else ""
        return self.draws / f"{start}{steps}"


def plan(job: Job, images: int | None, solver_steps: int | None) -> AuditJob:
    """Check all that an audit needs, before any work.

    Args:
        images: by default ``evaluation.samples``, or the whole data set where that is smaller.
        solver_steps: see :func:`dvdp.audit.result.solver_sampling`.

    Raises:
        UserError: weights, extractor or reference are missing, more images asked than the data set has, steps that do
            not fit.
    """
    if not is_finished(job.folder):
        raise UserError(
            f"audit: found no weights of {job.name} in '{job.folder}', expected a finished run; run `dvdp train` with"
            " the same params first."
        )
    check_scorable(job.params)
    store, schedule = ImageStore(DataPaths.of(job.params).store), job.run.build_schedule()
    count = min(job.params.evaluation.samples, len(store)) if images is None else images
    check_count(count, store)
    solver = solver_sampling(job.run.sampling.options(), schedule.timesteps, solver_steps)
    if solver is not None:
        try:
            share_steps(schedule, solver["steps"])
        except UserError as error:
            raise UserError(f"--solver-{error}") from None
    return AuditJob(job, count, solver, read_reference(DataPaths.of(job.params).reference))


def audit_jobs(audits: list[AuditJob]) -> list[Audit]:
    """The audits, of which those that are there already are read; starts a cluster if anything is left to draw."""
    work = {each.job.name: _missing(each) for each in audits if not each.result.exists()}
    if any(work.values()):
        with cluster(audits[0].job.params.cluster) as slots, slots:
            for name, tasks in work.items():
                _draw_all(name, tasks, audits[0].job.params.cluster, slots)
    return [_finish(each) for each in audits]


def draw_part(
    weights: str,
    store: str,
    folder: str,
    sampling: SamplingParams,
    options: Mapping[str, Any],
    start: str,
    first: int,
    count: int,
    params: ClusterParams,
) -> int:
    """Draw images number ``first`` on from a start into one file, states beside it; on a worker.

    Returns:
        The number of images.
    """
    torch.set_num_threads(params.threads)
    # Sampling as the params say, not the weights: one that was changed needs no new training.
    model = load_model(weights, "cuda" if params.gpu else "cpu", sampling)
    images = ImageStore(Path(store))
    subject = Subject(model.process, model.denoiser, images, options, sampling.batch, model.device, model.classes)
    drawn, states = draw(subject, FREE if start == SOLVER else start, first, count)
    path = Path(folder) / f"{first:08d}.npy"
    if start == FREE:
        named = {f"{k}.{name}": value for k, kept in states.items() for name, value in kept._asdict().items()}
        write_atomically(path.with_suffix(".safetensors"), tensors.pack(KIND, {"count": count}, named))
    # Last: a shard that is there is complete.
    write_shard(path, drawn)
    return count


def _missing(audit: AuditJob) -> list[tuple[Any, ...]]:
    """Arguments of :func:`draw_part` for what is not drawn yet, the longest work first."""
    job = audit.job
    shards = [(first, min(SHARD_IMAGES, audit.images - first)) for first in range(0, audit.images, SHARD_IMAGES)]
    return [
        (
            str(job.weights.resolve()),
            str(DataPaths.of(job.params).store.resolve()),
            str(audit.folder(start).resolve()),
            job.run.sampling,
            audit.solver if start == SOLVER else job.run.sampling.options(),
            start,
            first,
            size,
            job.params.cluster,
        )
        for start in sorted(audit.starts, key=lambda start: start != SOLVER)
        for first, size in shards
        if images_in(audit.folder(start) / f"{first:08d}.npy") < size
    ]


def _draw_all(name: str, tasks: list[tuple[Any, ...]], params: ClusterParams, slots: threading.Semaphore) -> None:
    total = sum(task[-2] for task in tasks)
    with tqdm(total=total, desc=f"draw for the audit of {name}", unit="image", mininterval=1, disable=not tasks) as bar:
        for count in on_workers(params, draw_part, tasks, slots):
            bar.update(count)


def _finish(audit: AuditJob) -> Audit:
    """Score and compare what was drawn, unless that is done; draw the chart."""
    job = audit.job
    if audit.result.exists():
        result = Audit.from_json(audit.result.read_text(), str(audit.result))
    else:
        from dvdp.evaluation.fidelity import metric_names

        extractor = extractor_of(job.params)
        metric = next(iter(metric_names(extractor.name).values()))
        scores = {start: _score(audit, start, extractor, metric) for start in audit.starts}
        subject, states = _subject(audit), _states(audit)
        result = conclude(subject, audit.solver, scores, states, audit.images, metric, _notes(audit))
        write_atomically(audit.result, result.to_json())
    if not audit.chart.exists():
        draw_audit(result, audit.chart, job.name)
    return result


def _score(audit: AuditJob, start: str, extractor: Extractor, metric: str) -> Score:
    """Of the images from a start, unless that is done."""
    path = audit.result.with_suffix("") / f"{audit.folder(start).name}.json"
    if not path.exists():
        params = audit.job.params
        real = read_features(DataPaths.of(params).reference, audit.reference)
        gpu = params.cluster.gpu and torch.cuda.is_available()
        # The other metrics are measured along and not used; a half must hold their subsets.
        subset = min(params.evaluation.kid_subset, audit.images // 2)

        def headline(images: Dataset) -> float:
            title = f"score {audit.job.name} {start}"
            return measure(images, real, extractor, subset, gpu, title)[metric]

        shards = [audit.folder(start) / f"{first:08d}.npy" for first in range(0, audit.images, SHARD_IMAGES)]
        found = score_images(SampleShards(shards), audit.images, headline)
        write_atomically(path, json.dumps(dataclasses.asdict(found)))
    known = json.loads(path.read_text())
    return Score(known["value"], tuple(known["halves"]))


def _subject(audit: AuditJob) -> Subject:
    """For true states: nothing is sampled with it, and its options are kept for the record."""
    job = audit.job
    model = load_model(job.weights)
    options = {**job.run.sampling.options(), "lift": job.run.sampling.lift}
    return Subject(model.process, model.denoiser, ImageStore(DataPaths.of(job.params).store), options)


def _states(audit: AuditJob) -> dict[int, States]:
    """Of free-running images, by k."""
    parts: dict[int, list[States]] = {}
    for path in (audit.folder(FREE) / f"{first:08d}.safetensors" for first in range(0, audit.images, SHARD_IMAGES)):
        _, kept = tensors.read(path, KIND, "audit", "delete it with its .npy and audit again")
        for k in range(1, len(audit.job.run.turning_points) + 1):
            parts.setdefault(k, []).append(States(*(kept[f"{k}.{name}"] for name in States._fields)))
    joined = {k: join(found) for k, found in parts.items()}
    # An earlier audit may have drawn more.
    return {k: States(*(values[: audit.images] for values in found)) for k, found in joined.items()}


def _notes(audit: AuditJob) -> dict[str, str]:
    return {
        "setting": audit.job.run.setting,
        "seed": str(audit.job.run.seed),
        "training_hash": audit.job.training_hash,
        "sampling_hash": audit.job.sampling_hash,
        "reference": audit.reference.sha256,
        "extractor_sha256": audit.reference.extractor_sha256,
    }
