"""The flow ``experiment``: train, sample, score and register every setting, then compare them.

Prefect shows and schedules it; the work itself is :mod:`pipelines.jobs`, the notes of it :mod:`pipelines.tracking`.
A setting that fails does not stop the others; the flow then ends failed. Whatever is finished is not done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from prefect import Task, flow, get_run_logger, task
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.runtime import flow_run
from prefect.states import Cancelled, Failed, State
from prefect.tasks import exponential_backoff

from dvdp.config import Params, read_params
from dvdp.errors import UserError
from dvdp.evaluation.figures import data_url
from dvdp.evaluation.records import ScoreRecord
from dvdp.files import locked
from dvdp.models.flops import relative_flops, training_images
from dvdp.text import markdown, utf8
from dvdp.training.loop import is_finished
from pipelines.artifacts import artifact_key
from pipelines.environment import reach_loopback_directly
from pipelines.jobs.cluster import Held, cluster
from pipelines.jobs.job import Job, jobs
from pipelines.jobs.machine import Busy
from pipelines.jobs.paths import DataPaths
from pipelines.jobs.sample import draw_process, sample_job, seconds_per_sample
from pipelines.jobs.score import anchors_of, check_scorable, score_job
from pipelines.jobs.timing import time_settings
from pipelines.jobs.train import LOG, train_job
from pipelines.left_behind import end_dead_runs, running
from pipelines.logs import to_flow_run, to_terminal
from pipelines.provenance import GIT_COMMIT, check_data_is_locked, provenance
from pipelines.reports.comparison import Result, Row, best, compare, legend, table
from pipelines.reports.nearest import nearest_table
from pipelines.reports.origin import Services
from pipelines.reports.page import Report, draw_samples, write_report
from pipelines.reports.paper_page import write_tables
from pipelines.reports.text_tables import as_text
from pipelines.starts import fetch_starts
from pipelines.tracking import registry
from pipelines.tracking.champion import promote_best
from pipelines.tracking.connection import (
    TrackingUnavailable,
    connect,
    is_temporary,
    reaching,
    tracking_address,
    unavailable,
)
from pipelines.tracking.descriptions import machine_tags, model_card, run_description
from pipelines.tracking.fetch import fetch_training
from pipelines.tracking.job_runs import check_tracking, description, model_file, model_name, tracked
from pipelines.tracking.runs import COMPARISON_HASH, TrackedRun, adopt, killed_when_interrupted, open_run, runs_page
from pipelines.tracking.sync import LedgerSync
from pipelines.tracking.system import watch_machine
from pipelines.turning_points import resolve
from pipelines.webhook import HOOKS


class _OneSentence(logging.Filter):
    """Drops the traceback from Prefect's word of what is no bug of ours."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], (UserError, TrackingUnavailable)):
            record.exc_info = None
        return True


for _name in ("prefect.task_runs", "prefect.flow_runs"):
    logging.getLogger(_name).addFilter(_OneSentence())


def _run_name() -> str:
    """Data set and commit; of params that cannot be read the flow itself says so."""
    with contextlib.suppress(UserError):
        params = read_params(flow_run.parameters["params_file"], flow_run.parameters["overrides"])
        commit, *dirty = provenance().get(GIT_COMMIT, "no commit").split("-")
        return f"{params.dataset.name} at {'-'.join([commit[:9], *dirty])}"
    return "experiment"


@flow(name="experiment", flow_run_name=_run_name, **HOOKS)
def experiment(
    params_file: str = "params.yaml", reports: str | None = None, overrides: dict[str, Any] | None = None
) -> State | None:
    """Run every setting of a params file and compare them.

    Args:
        overrides: other values than the file's by key, such as ``{"training.batch": 64}``, checked before any work.
        reports: folder of the report, an output of ``dvc repro``. Without it (as when scheduled) nothing that DVC
            tracks is written: the data must be what ``dvc.lock`` names, and the report goes beside the runs.

    Returns:
        A failed state that says which settings failed and why, if any did (they do not stop the others), or that
        MLflow was unavailable; a cancelled one if it left the machine to another run (``cluster.busy``).
    """
    # A scheduled flow runs without the CLI.
    reach_loopback_directly()
    to_terminal()
    with running(flow_run.id or uuid.uuid4().hex), to_flow_run(flow_run.id):
        end_dead_runs()
        try:
            return _experiment(read_params(params_file, overrides), reports)
        except Busy as other:
            return Cancelled(message=str(other))


def _experiment(params: Params, reports: str | None) -> State | None:
    if reports is None:
        check_data_is_locked(DataPaths.of(params).store)
    check_scorable(params)
    listed = jobs(resolve(fetch_starts(params)))
    check_tracking(listed[0])
    # The driver draws pictures beside running settings.
    torch.set_num_threads(params.cluster.threads)
    results: list[Result] = []
    failures: dict[str, str] = {}
    with cluster(params.cluster) as slots, killed_when_interrupted():
        futures = {}
        # The longest first, so that none runs on alone.
        for job in sorted(listed, key=_length, reverse=True):
            # As many at a time as there are slots; after Ctrl-C, which is heard here, none begins any more.
            held = slots.hold(params.cluster.num_workers)
            futures[job.name] = run_setting.submit(job, held)
            futures[job.name].add_done_callback(held.release)
        outcomes = {job.name: futures[job.name].result(raise_on_failure=False) for job in listed}
        done = [outcome.job for outcome in outcomes.values() if isinstance(outcome, Result)]
        if done:
            measure_speed(done)
            with slots.hold(1) as held:
                anchors_of(params, held)
    for name, outcome in outcomes.items():
        if isinstance(outcome, Result):
            results.append(outcome)
        else:
            failures[name] = utf8(str(outcome))
    unavailable = [result.problem for result in results]
    if results:
        folder = Path(reports) if reports else params.cluster.storage / "reports" / _comparison_hash(results)
        unavailable.append(compare_settings(results, failures, folder))
    # What MLflow is missing is reported once.
    problems = [f"{name} failed: {failure}" for name, failure in failures.items()] + [*filter(None, unavailable)][-1:]
    return Failed(message="; ".join(problems)) if problems else None


def _length(job: Job) -> float:
    """How long a setting trains, roughly and relative to others: by its FLOPs, and some by its images."""
    return training_images(job.run) * (relative_flops(job.run) + 0.2)


@task(task_run_name="{job.name}", cache_policy=NO_CACHE)
def run_setting(job: Job, held: Held) -> Result:
    """One setting from training to registration, in one process at a time: who comes second finds it finished.

    Args:
        held: slots for its ranks. Scoring keeps one of them, so that another setting begins to train as soon as it fits
            beside that, and registration none.
    """
    with locked(job.folder / f"{job.sampling_hash}.lock"):
        try:
            train(job, held)
            sample(job, held)
            record = score(job, held)
            held.release()
        except BaseException:
            # As well as MLflow answers: it is no reason to fail differently.
            with contextlib.suppress(Exception):
                tracked(job).set_status("FAILED")
            raise
        try:
            register(job, record)
        except Exception as error:  # Whatever happens to tracking costs neither the score nor the report.
            return Result(job, record, problem=_said(error, job.folder))
    return Result(job, record)


def _said(error: Exception, folder: Path) -> str:
    """Why MLflow does not have what lies in a folder."""
    return str(error if isinstance(error, TrackingUnavailable) else unavailable(tracking_address(), folder, error))


def _may_pass(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Whether another attempt may succeed."""
    return isinstance(state.data, Exception) and is_temporary(state.data)


@task(task_run_name="train {job.name}", cache_policy=NO_CACHE)
def train(job: Job, held: Held) -> None:
    """Train on the cluster, unless MLflow has the weights; it follows as well as it can."""
    if fetched := fetch_training(job):
        get_run_logger().info("%s", fetched)
        return

    def begin() -> TrackedRun:
        run = tracked(job)
        if not is_finished(job.folder):
            run.set_status("RUNNING")
            run.describe(run_description(job))
            if not ends:
                ends.append(watch_machine(run))
        return run

    ends: list[Callable[[], None]] = []
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [end() for end in ends])
        try:
            sync = LedgerSync(connect(), job.folder, begin).start()
        except (TrackingUnavailable, UserError) as problem:
            get_run_logger().warning("%s", _said(problem, job.folder))
        else:
            stack.callback(_close, sync, job.folder)
        train_job(job, description(job), held)


def _close(sync: LedgerSync, folder: Path) -> None:
    try:
        sync.close(timeout=5)
    except (TrackingUnavailable, UserError) as problem:
        get_run_logger().warning("%s", _said(problem, folder))


@task(task_run_name="sample {job.name}", cache_policy=NO_CACHE)
def sample(job: Job, held: Held) -> None:
    """Draw images from the EMA weights, and one with all its states."""
    sample_job(job, held)
    draw_process(job)


@task(task_run_name="score {job.name}", cache_policy=NO_CACHE)
def score(job: Job, held: Held) -> ScoreRecord:
    """Score the images."""
    return score_job(job, held)


@task(
    task_run_name="register {job.name}",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=exponential_backoff(5),
    retry_condition_fn=_may_pass,
)
def register(job: Job, record: ScoreRecord) -> None:
    """Put everything about a trained setting into MLflow: what is missing of its metrics, scores, pictures, model."""
    client = connect()
    with LedgerSync(client, job.folder, lambda: tracked(job)), reaching(client, job.folder):
        run = tracked(job)
        measured = {**record.metrics, "seconds_per_sample": seconds_per_sample(job)}
        run.set_metrics(measured, step=training_images(job.run))
        run.log_json("score.json", json.loads(record.to_json()))
        run.log_text("nearest.csv", nearest_table(job).read_text())
        run.log_file(job.folder / "estimate.json")
        run.log_file(job.folder / "metrics.jsonl")
        run.log_json("params.json", job.params.describe())
        if (job.folder / LOG).is_file():
            run.log_file(job.folder / LOG)
        samples = draw_samples(job, job.folder / "pictures" / f"samples-{job.sampling_hash}.png")
        run.log_file(samples, "pictures")
        run.log_file(draw_process(job), "pictures")
        run.set_tags(machine_tags(job))
        run.describe(run_description(job, record))
        version = registry.register(
            run, model_name(job.params), model_file(job), description(job), record, training_images(job.run)
        )
        registry.set_card(client, version, model_card(job, record, run, version, f"pictures/{samples.name}"))
        run.set_status("FINISHED")


@task(name="measure speed", cache_policy=NO_CACHE)
def measure_speed(done: list[Job]) -> None:
    """Time all settings in turns, now that nothing runs beside them; a comparison without is one all the same."""
    try:
        time_settings(done)
    except UserError as problem:
        get_run_logger().warning("the settings are not timed: %s", problem)


@task(name="compare", cache_policy=NO_CACHE)
def compare_settings(results: list[Result], failures: Mapping[str, str], folder: Path) -> str:
    """One table, one contact sheet, one page; the best model becomes the champion.

    Returns:
        Why MLflow does not have it, or the empty string.
    """
    rows = compare(results)
    report = write_report(folder, rows, results, failures, _services(results), model_name(results[0].job.params))
    headings, cells = table(rows, results[0].record.headline)
    notes = legend(rows, results[0].record, anchors_of(results[0].job.params)["real"])
    lines = [as_text(headings, cells), *notes, "", *_where_to_look(report, results[0].job.params)]
    get_run_logger().info("%s", "\n".join(["", *lines]))

    data = results[0].job.params.dataset.name
    on = f"of {len(rows)} settings on {markdown(data)}"
    create_table_artifact(
        [dict(zip(headings, line, strict=True)) for line in cells],
        key=artifact_key("comparison", data),
        description=f"Scores and speed-ups {on}.",
    )
    create_markdown_artifact(
        "\n\n".join([report.text, *map(markdown, notes)]),
        key=artifact_key("report", data),
        description=f"The report {on}, as in {markdown(str(report.page))}.",
    )
    create_image_artifact(
        data_url(report.contact_sheet),
        key=artifact_key("samples", data),
        description=f"The first samples {on}, one row each.",
    )
    for result in results:
        create_image_artifact(
            data_url(draw_process(result.job)),
            key=artifact_key("process", data, result.job.name),
            description=f"An image on its way to noise, and one that {markdown(result.job.name)} drew on its way back.",
        )
    try:
        _compare_in_mlflow(results, rows, report)
    except Exception as error:
        if not isinstance(error, (TrackingUnavailable, UserError)):
            get_run_logger().exception("comparison in MLflow")
        return _said(error, folder)
    return ""


def _compare_in_mlflow(results: list[Result], rows: list[Row], report: Report) -> None:
    client = connect()
    params = results[0].job.params
    with reaching(client, params.cluster.storage):
        leader, primary = best(rows), results[0].record.headline
        name = f"{params.dataset.name}: {leader.setting}, {primary} {leader.estimate.text}"
        parent = open_run(client, params.tracking.experiment, COMPARISON_HASH, _comparison_hash(results), name)
        headings, cells = table(rows, primary)
        parent.log_table("comparison.json", [dict(zip(headings, line, strict=True)) for line in cells])
        parent.set_metrics(_figures(rows), 0)
        parent.log_file(report.contact_sheet)
        parent.log_file(report.page)
        for file in write_tables(params, report.folder / "paper").files:
            parent.log_file(file, "paper")
        parent.set_tags({"dvdp.best_setting": leader.setting, **provenance(store=DataPaths.of(params).store)})
        adopt(parent, {result.job.name: tracked(result.job) for result in results}, report.text, name)
        get_run_logger().info("%s", promote_best(client, model_name(params), params.tracking.max_score).text)
        parent.set_status("FINISHED")


def _figures(rows: list[Row]) -> dict[str, float]:
    """Of a comparison: what it is compared with others by, and every setting's."""
    leader = best(rows)
    figures: dict[str, float | None] = {"score_best": leader.score, "score_best_margin": leader.estimate.margin}
    for row in rows:
        own = {
            **row.metrics,
            "score": row.score,
            "score_margin": row.estimate.margin,
            "score_spread_over_seeds": row.spread if row.seeds > 1 else None,
            "training_speedup": row.training_speedup,
            "training_speedup_bound": row.training_bound,
            "sampling_speedup": row.sampling_speedup,
            "sampling_speedup_bound": row.sampling_bound,
        }
        figures |= {f"{row.setting}/{name}": value for name, value in own.items()}
    return {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}


def _comparison_hash(results: list[Result]) -> str:
    names = sorted(result.job.sampling_hash for result in results)
    return hashlib.sha256("/".join(names).encode()).hexdigest()[:12]


def _services(results: list[Result]) -> Services:
    """Where the runs can be looked at; without their ids where MLflow does not have them."""
    runs: dict[str, tuple[str, str]] = {}
    if not any(result.problem for result in results):
        with contextlib.suppress(Exception):  # It is said where the comparison goes to MLflow.
            found = {result.job.name: tracked(result.job) for result in results}
            runs = {name: (run.experiment_id, run.run_id) for name, run in found.items()}
    return Services(tracking_address(), runs, os.environ.get("PREFECT_API_URL", ""), flow_run.id or "")


def _where_to_look(report: Report, params: Params) -> list[str]:
    page = runs_page(params.tracking.experiment)
    mlflow, prefect = os.environ.get("MLFLOW_TRACKING_URI", ""), os.environ.get("PREFECT_API_URL", "")
    return [
        f"Report:  open {report.page}",
        f"MLflow:  {'' if mlflow.startswith('http') else 'make ui, then '}open {page}",
        f"Prefect: open {prefect.removesuffix('/api')}"
        if prefect
        else "Prefect: make services, then open http://127.0.0.1:4200",
    ]
