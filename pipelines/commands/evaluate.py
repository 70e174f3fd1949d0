"""``dvdp evaluate``: scores of what is sampled already, or of a registered model, added to what MLflow knows.

A run's own metrics are those that the experiment gave it. Every other record (another sampler, other counts, another
reference) is a run of its own beneath it, named ``evaluation`` and found by what the record says, so that nothing is
replaced and the same record is there once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.utils import mlflow_tags

from dvdp.config import Params
from dvdp.errors import UserError
from dvdp.evaluation.published import read_statistics
from dvdp.evaluation.records import ScoreRecord
from dvdp.evaluation.reference import read_reference
from dvdp.models.export import load_model
from dvdp.models.flops import training_images
from pipelines.jobs.cluster import Held, cluster
from pipelines.jobs.job import Job, Sampled
from pipelines.jobs.paths import DataPaths
from pipelines.jobs.sample import missing_shards, sample_job
from pipelines.jobs.score import check_scorable, extractor_of, is_scored, score_job
from pipelines.tracking import registry
from pipelines.tracking.connection import connect, reaching
from pipelines.tracking.job_runs import tracked
from pipelines.tracking.lookup import fetched, folder_of, looked_up
from pipelines.tracking.runs import DATASET_DIGEST, EVALUATION_HASH, EVALUATION_OF, TrackedRun, open_run, read_text


@dataclass(frozen=True)
class RegisteredModel(Sampled):
    """A version of a registered model, sampled as the params say now (so does its run), in a folder of its own."""

    title: str
    weights_digest: str
    """Of its weights."""
    run_id: str
    """Of the MLflow run that the version comes from."""
    dataset_digest: str
    """Of what it was trained on."""

    @property
    def name(self) -> str:
        """The version's."""
        return self.title

    @property
    def trained(self) -> str:
        """The digest of the weights."""
        return self.weights_digest

    @property
    def folder(self) -> Path:
        """Named for the weights."""
        return folder_of(self.params, self.weights_digest)


def registered_model(params: Params, address: str) -> RegisteredModel:
    """Look a version up in MLflow and keep a copy of its weights.

    Args:
        address: see :func:`pipelines.tracking.lookup.looked_up`.

    Raises:
        UserError: there is no such version, it is none of ours, its images have another resolution than the data
            set, MLflow does not answer, or the sampling of the params does not fit it.
    """
    with looked_up(params, address) as (client, version):
        return _fetched(client, params, version, address)


def evaluate(subject: Job | RegisteredModel, statistics: Path | None = None) -> ScoreRecord:
    """Score a job's samples, or sample and score a registered model; what is there already is not made again.

    Args:
        statistics: an ``.npz`` file to score against in place of the reference.

    Raises:
        UserError: something that scoring needs is missing; raised before images are drawn.
    """
    params = subject.params
    if isinstance(subject, Job):
        with _workers(params, params.cluster.gpu and not is_scored(subject, statistics)) as held:
            return score_job(subject, held, statistics)
    if params.evaluation.samples > params.sampling.count:
        raise UserError(
            f"evaluation.samples: found {params.evaluation.samples}, expected at most sampling.count,"
            f" {params.sampling.count}; draw more or score fewer."
        )
    if statistics is None:
        check_scorable(params)
    else:
        read_statistics(statistics, extractor_of(params).features)
    missing = bool(missing_shards(subject))
    with _workers(params, missing or (params.cluster.gpu and not is_scored(subject, statistics))) as held:
        if held is not None:
            sample_job(subject, held)
        return score_job(subject, held, statistics, [] if statistics else _foreign(subject))


@contextlib.contextmanager
def _workers(params: Params, needed: bool) -> Iterator[Held | None]:
    """Slots of a cluster, which takes seconds to start: without a GPU to share, scoring alone needs none."""
    if not needed:
        yield None
        return
    with cluster(params.cluster) as slots, slots.hold(params.cluster.num_workers) as held:
        yield held


def track(subject: Job | RegisteredModel, record: ScoreRecord) -> None:
    """Add a record to the MLflow run of a job, or of a model's training; again changes nothing.

    Raises:
        TrackingUnavailable: MLflow does not answer; everything is on disk.
    """
    client = connect()
    with reaching(client, subject.samples):
        if isinstance(subject, Job):
            run = tracked(subject)
            if client.get_run(run.run_id).info.status == "RUNNING":  # One that failed stays so.
                run.set_status("FINISHED")
        else:
            found = client.get_run(subject.run_id)
            run = TrackedRun(client, found.info.run_id, found.info.experiment_id)
        add_evaluation(run, record, training_images(subject.run))


def add_evaluation(run: TrackedRun, record: ScoreRecord, step: int) -> None:
    """A run beneath ``run`` for a record other than its own; see the top of this file.

    Args:
        step: images seen in training.
    """
    client = run.client
    own = read_text(client, run.run_id, "score.json")
    with contextlib.suppress(UserError):  # of another release
        if own is not None and ScoreRecord.from_json(own) == record:
            return
    key = hashlib.sha256(f"{run.run_id} {record.to_json()}".encode()).hexdigest()[:16]
    experiment = client.get_experiment(run.experiment_id).name
    child = open_run(client, experiment, EVALUATION_HASH, key, "evaluation")
    child.set_tags({mlflow_tags.MLFLOW_PARENT_RUN_ID: run.run_id, EVALUATION_OF: run.run_id})
    # What scores can differ for, so that MLflow's page of several shows it.
    outcome = ("metrics", "warnings", "counts")
    child.log_params({name: value for name, value in dataclasses.asdict(record).items() if name not in outcome})
    child.set_metrics(record.metrics, step)
    child.log_text("score.json", record.to_json())
    child.set_status("FINISHED")


def _fetched(client: MlflowClient, params: Params, version: ModelVersion, address: str) -> RegisteredModel:
    weights = fetched(client, params, version, address)
    model = load_model(weights, sampling=params.sampling)
    if model.resolution != params.dataset.resolution:
        raise UserError(
            f"--model: found a model of {model.resolution} px images, expected dataset.resolution,"
            f" {params.dataset.resolution} px; give the params of its data set with --params."
        )
    model.run.check()
    return RegisteredModel(
        params=params,
        run=model.run,
        title=f"{version.name} version {version.version}",
        weights_digest=version.tags[registry.WEIGHTS_DIGEST],
        run_id=str(version.run_id),
        dataset_digest=version.tags.get(DATASET_DIGEST, ""),
    )


def _foreign(model: RegisteredModel) -> list[str]:
    """A remark if the model is scored against other images than it was trained on."""
    digest = read_reference(DataPaths.of(model.params).reference).data_digest
    if digest == model.dataset_digest:
        return []
    return [f"{model.name} was trained on another data set than the reference's, '{model.params.dataset.name}'."]
