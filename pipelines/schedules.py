"""Small flows beside the experiment, of ``prefect.yaml``: new data, the champion's score, its images, clean-up."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
from prefect import flow
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from prefect.runtime import flow_run
from prefect.states import Completed, State

from dvdp.config import Params, read_params
from dvdp.data.sources.files import fingerprint
from dvdp.data.store import ImageStore
from dvdp.errors import UserError
from dvdp.evaluation.figures import data_url
from dvdp.evaluation.records import ScoreRecord
from dvdp.files import write_atomically
from dvdp.text import markdown
from pipelines.commands.clean import clean
from pipelines.commands.evaluate import evaluate, registered_model, track
from pipelines.commands.runs import sample
from pipelines.environment import reach_loopback_directly
from pipelines.jobs.paths import DataPaths
from pipelines.left_behind import end_dead_runs, end_processes, running
from pipelines.logs import to_flow_run, to_terminal
from pipelines.reports.page import draw_samples
from pipelines.tracking.champion import CHAMPION
from pipelines.tracking.job_runs import model_name
from pipelines.webhook import HOOKS

logger = logging.getLogger("dvdp.schedules")

#: Seconds that DVC and what it started have to end.
PATIENCE = 20.0


@contextlib.contextmanager
def _at_work() -> Iterator[None]:
    """What every scheduled flow needs around it."""
    reach_loopback_directly()
    to_terminal()
    with to_flow_run(flow_run.id):
        end_dead_runs()
        yield


@flow(name="refresh", **HOOKS)
def refresh(params_file: str = "params.yaml") -> State[None]:
    """Prepare the data set again where the files of ``dataset.path`` changed, and ``dvc repro`` where its images did.

    Unlike the experiment it changes what DVC tracks: commit ``dvc.lock`` afterwards.

    Raises:
        UserError: DVC fails; the data set is then as before.
    """
    with _at_work(), running(flow_run.id or uuid4().hex):
        params = read_params(params_file)
        path, note = params.dataset.path, params.cluster.storage / "sources" / f"{params.dataset.name}.json"
        if path is None:
            return _said(f"Nothing new: source {params.dataset.source} has no files that could change.")
        files = fingerprint(path)
        known = json.loads(note.read_text()) if note.is_file() else {"files": "", "digest": _digest(params)}
        if known["files"] == files:
            return _said(f"Nothing new: no file at {path} has changed.")
        # As of the last refresh that came to its end: what fails now is done the next time.
        write_atomically(note, json.dumps(known))
        try:
            _dvc("repro", "--force", "--single-item", "prepare")
        except BaseException:
            with contextlib.suppress(UserError):
                _dvc("checkout", "prepare")
            raise
        digest = _digest(params)
        if digest != known["digest"]:
            logger.info("the images at %s have changed; training begins", path)
            _dvc("repro")
        write_atomically(note, json.dumps({"files": files, "digest": digest}))
        if digest == known["digest"]:
            return _said(f"Nothing new: files at {path} have changed, and the images have not.")
        return _said(f"New images: digest {digest}, before {known['digest'] or 'none'}. Commit dvc.lock.")


@flow(name="re-evaluate", **HOOKS)
def re_evaluate(
    params_file: str = "params.yaml", overrides: dict[str, Any] | None = None, alias: str = CHAMPION
) -> State[None]:
    """Sample and score the registered model that has an alias, as the params say now, and add that to MLflow.

    Raises:
        UserError: no version has the alias, or the params do not fit it.
        TrackingUnavailable: MLflow does not answer.
    """
    with _at_work(), running(flow_run.id or uuid4().hex):
        params = read_params(params_file, overrides)
        model = registered_model(params, f"models:/{model_name(params)}@{alias}")
        record = evaluate(model)
        create_table_artifact(
            [{"score": name, "value": f"{value:.4g}"} for name, value in record.metrics.items()],
            key="re-evaluation",
            description=f"{markdown(model.name)} ({markdown(alias)}), sampled and scored again.",
        )
        track(model, record)
        return _said(f"{model.name} ({alias}): {_scores(record)}")


@flow(name="generate", **HOOKS)
def generate(
    out: str = "images",
    model: str | None = None,
    params_file: str = "params.yaml",
    overrides: dict[str, Any] | None = None,
) -> State[None]:
    """``dvdp sample --model --out``: draw images from a registered model; a run that was cut short is gone on with.

    Args:
        out: folder of PNG files, one an image.
        model: ``models:/<name>@<alias>`` or ``models:/<name>/<version>``; by default the champion.
        overrides: of the params, such as ``{"sampling.count": 50000}``.

    Raises:
        UserError: there is no such version, the params do not fit it, or ``out`` holds something else.
        TrackingUnavailable: MLflow does not answer.
    """
    with _at_work(), running(flow_run.id or uuid4().hex):
        params = read_params(params_file, overrides)
        chosen = registered_model(params, model or f"models:/{model_name(params)}@{CHAMPION}")
        (folder,) = sample(params, [chosen], Path(out))
        picture = draw_samples(chosen, params.cluster.storage / "pictures" / f"generated-{chosen.sampling_hash}.png")
        create_image_artifact(
            data_url(picture), key="generated", description=f"The first images of {markdown(chosen.name)}."
        )
        return _said(f"{params.sampling.count:,} images of {chosen.name} in {folder}.")


@flow(name="clean", **HOOKS)
def clean_up(
    params_file: str = "params.yaml", keep: list[str] | None = None, days: int = 30, remove: bool = False
) -> State[None]:
    """``dvdp clean``: list what finished runs left and nobody needs, and remove it if ``remove``.

    Args:
        keep, days: see :func:`pipelines.commands.clean.clean`.
    """
    with _at_work():
        text = clean(read_params(params_file), keep or (), days, remove)
        create_markdown_artifact(
            f"```\n{text}\n```",
            key="clean-up",
            description=f"What was {'removed' if remove else 'found, and not removed'}.",
        )
        return _said(text.splitlines()[-1])


def _scores(record: ScoreRecord) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in record.metrics.items())


def _said(text: str) -> State[None]:
    """The end of a flow run that did what it should, with a word that Prefect's list of runs shows."""
    logger.info("%s", text)
    return Completed(message=text)


def _digest(params: Params) -> str:
    """Of the images that are prepared; empty where none are."""
    with contextlib.suppress(UserError):
        return ImageStore(DataPaths.of(params).store).metadata.digest
    return ""


def _dvc(*arguments: str) -> None:
    """Run DVC to its end; if this ends before, so does all that DVC started."""
    last: deque[str] = deque(maxlen=10)
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=Path.cwd(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    try:
        for line in filter(None, map(str.strip, process.stdout)):
            last.append(line)
            logger.info("dvc: %s", line)
        status = process.wait()
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            end_processes([parent, *parent.children(recursive=True)], PATIENCE)
    if status:
        raise UserError(
            f"dvc {' '.join(arguments)}: found exit status {status}, expected 0; it said: {' '.join(last)[-500:]}"
        )
