"""``dvdp audit``: which level, which lift or the solver costs a trained setting its score.

A run's folder keeps ``audits/<hash>.json``, the result, beside it its chart, and in a folder of what was drawn (images
from every start, in shards, and the states of free-running ones) whatever a stopped audit goes on with.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
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
from dvdp.config import SamplingParams
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
from pipelines.jobs.cluster import Held, cluster, on_workers
from pipelines.jobs.device import worker_device
from pipelines.jobs.job import Job
from pipelines.jobs.likelihood import has_likelihood, likelihood_job
from pipelines.jobs.paths import DataPaths
from pipelines.jobs.sample import SHARD_IMAGES, images_in
from pipelines.jobs.score import check_scorable, extractor_of, for_worker, on_this_node

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
    """The audits, of which those that are there already are read; starts a cluster if there is one to make."""
    work = [each for each in audits if not each.result.exists()]
    bounds = [each.job for each in audits if not has_likelihood(each.job)]
    if work or bounds:
        params = audits[0].job.params.cluster
        with cluster(params) as slots, slots.hold(params.num_workers) as held:
            for each in work:
                _draw_all(each, held)
            for each in work:
                _score_all(each, held)
            for job in bounds:
                likelihood_job(job, held)
    return [_finish(each) for each in audits]


class Drawer:
    """Draws images of an audit from any start, on a worker."""

    def __init__(
        self,
        weights: str,
        store: str,
        sampling: SamplingParams,
        threads: int,
        device: str,
        turning_points: tuple[int, ...],
    ) -> None:
        torch.set_num_threads(threads)
        # Sampling as the params say, not the weights: one that was changed needs no new training.
        self._model, self._images, self._batch = (
            load_model(weights, device, sampling, turning_points),
            ImageStore(Path(store)),
            sampling.batch,
        )

    def __call__(
        self, folder: str, options: Mapping[str, Any], start: str, first: int, count: int
    ) -> Callable[[], int]:
        """Draw images number ``first`` on; what is returned writes them into one file, and returns their number.

        Beside it are the states of free-running ones.
        """
        model = self._model
        subject = Subject(
            model.process, model.denoiser, self._images, options, self._batch, model.device, model.classes
        )
        drawn, states = draw(subject, FREE if start == SOLVER else start, first, count)

        def write() -> int:
            path = Path(folder) / f"{first:08d}.npy"
            if start == FREE:
                named = {f"{k}.{name}": value for k, kept in states.items() for name, value in kept._asdict().items()}
                write_atomically(path.with_suffix(".safetensors"), tensors.pack(KIND, {"count": count}, named))
            # Last: a shard that is there is complete.
            write_shard(path, drawn)
            return count

        return write


def _draw_all(audit: AuditJob, held: Held) -> None:
    job, tasks = audit.job, _missing(audit)
    params, store = job.params.cluster, DataPaths.of(job.params).store
    places = str(job.weights.resolve()), str(store.resolve())
    device, points = worker_device(params), job.run.turning_points
    drawer = partial(Drawer, *places, job.run.sampling, params.threads, device, points)
    total, title = sum(task[-1] for task in tasks), f"draw for the audit of {job.name}"
    with tqdm(total=total, desc=title, unit="image", mininterval=1, disable=not tasks) as bar:
        for count in on_workers(params, drawer, tasks, held):
            bar.update(count)


def _missing(audit: AuditJob) -> list[tuple[Any, ...]]:
    """Arguments of :class:`Drawer` for what is not drawn yet, the longest work first."""
    job = audit.job
    shards = [(first, min(SHARD_IMAGES, audit.images - first)) for first in range(0, audit.images, SHARD_IMAGES)]
    return [
        (
            str(audit.folder(start).resolve()),
            audit.solver if start == SOLVER else job.run.sampling.options(),
            start,
            first,
            size,
        )
        for start in sorted(audit.starts, key=lambda start: start != SOLVER)
        for first, size in shards
        if images_in(audit.folder(start) / f"{first:08d}.npy") < size
    ]


class Scorer:
    """Scores images of an audit on a worker."""

    def __init__(
        self, reference: Path, about: Reference, extractor: Extractor, kid_subset: int, threads: int, device: str
    ) -> None:
        torch.set_num_threads(threads)
        self._real, self._extractor = read_features(reference, about), on_this_node(extractor)
        self._kid_subset, self._gpu = kid_subset, device == "cuda"

    def __call__(self, start: str, shards: list[Path], count: int) -> Callable[[], tuple[str, Score]]:
        """The score of so many images from a start, when what is returned is called."""
        from dvdp.evaluation.fidelity import metric_names

        metric = next(iter(metric_names(self._extractor.name).values()))

        def headline(images: Dataset) -> float:
            return measure(images, self._real, self._extractor, self._kid_subset, self._gpu, start)[metric]

        found = start, score_images(SampleShards(shards), count, headline)
        return lambda: found


def _score_all(audit: AuditJob, held: Held) -> None:
    """Write the score of the images from each start, unless that is done."""
    params, places, extractor = audit.job.params, DataPaths.of(audit.job.params), extractor_of(audit.job.params)
    numbers = range(0, audit.images, SHARD_IMAGES)
    tasks = [
        (start, [audit.folder(start).resolve() / f"{first:08d}.npy" for first in numbers], audit.images)
        for start in audit.starts
        if not _score_path(audit, start).exists()
    ]
    # The other metrics are measured along and not used; a half must hold their subsets.
    subset = min(params.evaluation.kid_subset, audit.images // 2)
    on = params.cluster.threads, worker_device(params.cluster)
    scorer = partial(Scorer, places.reference.resolve(), audit.reference, for_worker(extractor), subset, *on)
    with tqdm(total=len(tasks), desc=f"score {audit.job.name}", unit="start", disable=None) as bar:
        for start, found in on_workers(params.cluster, scorer, tasks, held):
            write_atomically(_score_path(audit, start), json.dumps(dataclasses.asdict(found)))
            bar.update()


def _score_path(audit: AuditJob, start: str) -> Path:
    return audit.result.with_suffix("") / f"{audit.folder(start).name}.json"


def _scores(audit: AuditJob) -> dict[str, Score]:
    known = {start: json.loads(_score_path(audit, start).read_text()) for start in audit.starts}
    return {start: Score(each["value"], tuple(each["halves"])) for start, each in known.items()}


def _finish(audit: AuditJob) -> Audit:
    """Compare what was drawn and scored, unless that is done; draw the chart."""
    job = audit.job
    if audit.result.exists():
        result = Audit.from_json(audit.result.read_text(), str(audit.result))
    else:
        from dvdp.evaluation.fidelity import metric_names

        metric = next(iter(metric_names(audit.reference.extractor).values()))
        subject, states = _subject(audit), _states(audit)
        result = conclude(subject, audit.solver, _scores(audit), states, audit.images, metric, _notes(audit))
        write_atomically(audit.result, result.to_json())
    if not audit.chart.exists():
        draw_audit(result, audit.chart, job.name)
    return result


def _subject(audit: AuditJob) -> Subject:
    """For true states: nothing is sampled with it, and its options are kept for the record."""
    job = audit.job
    model = load_model(job.weights, turning_points=job.run.turning_points)
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
