"""All that is written to MLflow, and what happens while MLflow is away.

The disk is the first place for everything: a run's metrics and previews are files in its folder, written whether or
not MLflow answers. :class:`LedgerSync` carries them over from a thread of the driver, for as long as it takes.
Everything else here is idempotent: a run is found by its training hash, and writing the same thing again changes
nothing. So what an outage or a kill has kept from MLflow is made up for by running the same command again.

Comparisons: a trained setting is a run of its own, at the top of its experiment, and belongs to as many comparisons
as one likes. A comparison is a run too, found by the hash of what it compares; it holds the table and the contact
sheet. :func:`adopt` nests the trained runs under the newest comparison they are in (``mlflow.parentRunId``, which
MLflow keeps one of) and writes links to all of them, and to MLflow's own page that lays them side by side, into the
comparison's description, which older comparisons keep.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
from PIL import Image

from dvdp.errors import UserError
from dvdp.files import locked
from dvdp.training import ledger

# Read by MLflow when it is imported and at every call. A call to a dead server fails in seconds rather than minutes.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

import requests
import yaml
from mlflow import MlflowClient
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.numpy_dataset import from_numpy
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils import mlflow_tags

logger = logging.getLogger("dvdp.tracking")

#: Tags that runs are found by.
TRAINING_HASH = "dvdp.training_hash"
SAMPLING_HASH = "dvdp.sampling_hash"
COMPARISON_HASH = "dvdp.comparison_hash"
EVALUATION_HASH = "dvdp.evaluation_hash"
#: Tag of an evaluation: the run that it is one of.
EVALUATION_OF = "dvdp.evaluation_of"
#: Tags that lead back to where a run, or a version of a model, comes from.
GIT_COMMIT = "dvdp.git_commit"
DVC_HASH = "dvdp.dvc_hash"
DATASET = "dvdp.dataset"
DATASET_DIGEST = "dvdp.dataset_digest"
PARAMS_DIGEST = "dvdp.params_digest"
SETTING = "dvdp.setting"
SEED = "dvdp.seed"
TURNING_POINTS = "dvdp.turning_points"

#: What MLflow takes in one call.
_BATCH = {"metrics": 1000, "params": 100, "tags": 100}
_MAX_PARAM = 6000
_MAX_DIGEST = 36
#: Seconds between attempts while MLflow is away, at most.
_MAX_PAUSE = 30.0

Status = Literal["RUNNING", "FINISHED", "FAILED"]


class TrackingAway(RuntimeError):  # noqa: N818 - a state of affairs, not a mistake
    """MLflow could not be reached, or did not take something. Nothing is lost: see the text."""


@contextlib.contextmanager
def reaching(client: MlflowClient, folder: Path) -> Iterator[None]:
    """Raise :class:`TrackingAway` for a server that does not answer; other errors stay as they are.

    Args:
        folder: where all that the block would log lies, for the text.
    """
    try:
        yield
    except Exception as error:
        if not _is_away(error):
            raise
        raise _away(client, folder, error) from error


def connect(project: Path | str = ".") -> MlflowClient:
    """A client of the store at ``MLFLOW_TRACKING_URI``, else of ``mlflow.db`` in the project folder.

    A server is not asked for anything yet, so that it may be away. A sqlite file is created where it is missing, by
    one process at a time: MLflow cannot do that in several at once.

    Raises:
        UserError: MLFLOW_TRACKING_URI is of a kind that MLflow refuses.
    """
    address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(project).resolve() / 'mlflow.db'}"
    database = _sqlite_file(address)
    if database is None:
        if not re.match(r"[a-z+]+://", address) or address.startswith("file:"):
            raise UserError(
                f"MLFLOW_TRACKING_URI: found '{address}', expected the address of a server (http://...) or a"
                " database (sqlite:///...), as MLflow keeps no plain folders; unset it to use mlflow.db here."
            )
        return MlflowClient(address)
    database.parent.mkdir(parents=True, exist_ok=True)
    address = f"sqlite:///{database}"
    with locked(_lock_of(address)):
        return MlflowClient(address)


@dataclass(frozen=True)
class TrackedRun:
    """A run in MLflow, and what we write to it. Every method may be called again with the same arguments."""

    client: MlflowClient
    run_id: str
    experiment_id: str

    def set_status(self, status: Status) -> None:
        """RUNNING when work goes on, then FINISHED or FAILED."""
        if status == "RUNNING":
            self.client.update_run(self.run_id, status=status)
        elif self.client.get_run(self.run_id).info.status != status:
            # Not again: that would move its end.
            self.client.set_terminated(self.run_id, status)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tags, in place of older values."""
        entries = [RunTag(key, str(value)) for key, value in tags.items()]
        for part in _parts(entries, _BATCH["tags"]):
            self.client.log_batch(self.run_id, tags=part, synchronous=True)

    def log_params(self, tree: Mapping[str, Any]) -> None:
        """Nested params as ``section.key``.

        MLflow never changes a param: give only what the run is found by (its training hash) covers, and put the rest
        into tags. One that differs stays as it was, with a warning.
        """
        known = self.client.get_run(self.run_id).data.params
        given = {key: value[:_MAX_PARAM] for key, value in flatten(tree).items()}
        for key in given.keys() & known.keys():
            if given[key] != known[key]:
                logger.warning("param %s stays '%s' in MLflow, which keeps the first value", key, known[key])
        entries = [Param(key, value) for key, value in given.items() if key not in known]
        for part in _parts(entries, _BATCH["params"]):
            self.client.log_batch(self.run_id, params=part, synchronous=True)

    def set_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Metrics outside the ledger, e.g. scores; a value that differs from the newest at this step is added."""
        now = time.time_ns() // 1_000_000
        changed = []
        for key, value in values.items():
            past = [entry for entry in self.client.get_metric_history(self.run_id, key) if entry.step == step]
            newest = max(past, key=lambda entry: entry.timestamp, default=None)
            if newest is None or not (newest.value == value or (math.isnan(newest.value) and math.isnan(value))):
                changed.append(Metric(key, value, now, step))
        for part in _parts(changed, _BATCH["metrics"]):
            self.client.log_batch(self.run_id, metrics=part, synchronous=True)

    def log_dataset(self, name: str, digest: str, sample: np.ndarray, context: str = "training") -> None:
        """Tie the run to its data set.

        Args:
            digest: of its content; MLflow shows the first 36 characters.
            sample: a few images, for the shape and type that MLflow shows; they are not stored.
        """
        # The digest is what leads back to the data; a path of this machine would not.
        source = CodeDatasetSource(tags={DATASET: name, DATASET_DIGEST: digest})
        dataset = from_numpy(sample, source=source, name=name, digest=digest[:_MAX_DIGEST])
        tags = [InputTag(mlflow_tags.MLFLOW_DATASET_CONTEXT, context)]
        self.client.log_inputs(self.run_id, [DatasetInput(dataset._to_mlflow_entity(), tags)])

    def log_image(self, path: str, image: Image.Image) -> None:
        """A picture at an artifact path, e.g. ``samples.png``."""
        self.client.log_image(self.run_id, image, artifact_file=path, synchronous=True)

    def log_figure(self, path: str, figure: Any) -> None:
        """A matplotlib figure at an artifact path."""
        self.client.log_figure(self.run_id, figure, path)

    def log_text(self, path: str, text: str) -> None:
        """A text at an artifact path."""
        self.client.log_text(self.run_id, text, path)

    def log_json(self, path: str, content: Any) -> None:
        """Plain data as indented JSON at an artifact path."""
        self.log_text(path, json.dumps(content, indent=2) + "\n")

    def log_file(self, file: Path, folder: str | None = None) -> None:
        """A copy of a file, in an artifact folder."""
        self.client.log_artifact(self.run_id, str(file), folder)

    def log_table(self, path: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table at an artifact path ``*.json``, in place of an older one; the rows' keys are its columns."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        # MLflow's own log_table appends to what is there; this is the format it reads.
        self.log_text(path, json.dumps({"columns": columns, "data": [[row.get(c) for c in columns] for row in rows]}))
        entry = {"path": path, "type": "table"}
        tags = self.client.get_run(self.run_id).data.tags
        tables = json.loads(tags.get(mlflow_tags.MLFLOW_LOGGED_ARTIFACTS, "[]"))
        if entry not in tables:
            self.set_tags({mlflow_tags.MLFLOW_LOGGED_ARTIFACTS: json.dumps([*tables, entry])})


def open_run(client: MlflowClient, experiment: str, key: str, value: str, name: str) -> TrackedRun:
    """The run of ``experiment`` whose tag ``key`` is ``value``: found, or created.

    Args:
        key: ``TRAINING_HASH``, ``COMPARISON_HASH``, ..
        name: of the run, when it is created.

    Raises:
        UserError: the experiment was deleted in MLflow.
    """
    with locked(_lock_of(client.tracking_uri)):
        experiment_id = _experiment(client, experiment)
        # Should there be several, made from several machines at once, everybody takes the same.
        order = ["attributes.start_time ASC", "attributes.run_id ASC"]
        found = client.search_runs([experiment_id], f"tags.`{key}` = '{value}'", order_by=order, max_results=1)
        if found:
            run = found[0]
        else:
            tags = {key: value, mlflow_tags.MLFLOW_SOURCE_NAME: "dvdp"}
            run = client.create_run(experiment_id, tags=tags, run_name=name)
    return TrackedRun(client, run.info.run_id, experiment_id)


def adopt(parent: TrackedRun, children: Mapping[str, TrackedRun], summary: str = "") -> None:
    """Make ``parent`` the comparison of ``children``, by name; see the top of this file.

    Args:
        summary: Markdown above the links in the parent's description.
    """
    for child in children.values():
        child.set_tags({mlflow_tags.MLFLOW_PARENT_RUN_ID: parent.run_id})
    runs = json.dumps([child.run_id for child in children.values()], separators=(",", ":"))
    experiments = json.dumps([parent.experiment_id])
    lines = [f"- [{name}](#/experiments/{child.experiment_id}/runs/{child.run_id})" for name, child in children.items()]
    query = f"runs={quote(runs)}&experiments={quote(experiments)}"
    side_by_side = f"[Side by side](#/compare-runs?{query}), or one by one:"
    note = "\n".join([*([summary, ""] if summary else []), side_by_side, "", *lines])
    parent.set_tags({mlflow_tags.MLFLOW_RUN_NOTE: note, "dvdp.children": runs})


def read_text(client: MlflowClient, run_id: str, path: str) -> str | None:
    """A text artifact at the top of a run; None where there is none."""
    if not any(artifact.path == path for artifact in client.list_artifacts(run_id)):
        return None
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run_id, path, folder)).read_text()


def provenance(project: Path | str = ".", store: Path | None = None) -> dict[str, str]:
    """Tags of the code and data that a run is made with, as far as there are any: git commit and DVC's hash.

    Args:
        store: the prepared data set; ``dvc.lock`` names its hash.
    """
    tags: dict[str, str] = {}
    lock = Path(project) / "dvc.lock"
    if store is not None and lock.is_file():
        stages = yaml.safe_load(lock.read_text()).get("stages", {})
        for out in (out for stage in stages.values() for out in stage.get("outs", [])):
            if Path(out["path"]) == store and "md5" in out:
                tags[DVC_HASH] = out["md5"]
    commit = _git(project, "rev-parse", "HEAD")
    if commit:
        dirty = _git(project, "status", "--porcelain", "--untracked-files=no")
        tags[GIT_COMMIT] = commit + ("-dirty" if dirty else "")
        # The one that MLflow's page shows.
        tags[mlflow_tags.MLFLOW_GIT_COMMIT] = commit
    return tags


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as ``{"section.key": text}``; lists and the like are JSON."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


class LedgerSync:
    """Carries ``metrics.jsonl`` and ``previews/*.png`` of a run's folder to MLflow, from a thread.

    For each metric and step MLflow gets one value, the first that was carried over, whatever happens to the driver,
    the workers, the ledger (which a resumed training shortens) or the server: what MLflow has is read at the start
    and after every call that failed, as that may have half happened. A server that is away is tried again for ever.

    As a context manager it starts, and closes at the end of the block; if the block raised, that is the error raised.

    Args:
        folder: of the run.
        find: opens the run in MLflow, and may log what is known at the start; called in the thread, and again after
            every failure.
        interval: seconds between looks at the folder.
    """

    def __init__(
        self, client: MlflowClient, folder: Path, find: Callable[[], TrackedRun], interval: float = 5.0
    ) -> None:
        self._client = client
        self._folder = Path(folder)
        self._find = find
        self._interval = interval
        self._closing = threading.Event()
        self._deadline = 0.0
        self._problem: Exception | None = None
        self._run: TrackedRun | None = None
        self._known: dict[str, set[int]] = {}
        """Steps that MLflow has, by metric."""
        self._previews: set[int] = set()
        self._seen: tuple[int, int, int] | None = None
        """State of the ledger when all of it was carried over."""
        self._thread = threading.Thread(target=self._work, name="ledger-sync", daemon=True)

    def start(self) -> LedgerSync:
        """Begin; returns itself."""
        self._thread.start()
        return self

    def close(self, timeout: float = 60.0) -> None:
        """Carry over what is left, and stop.

        Args:
            timeout: seconds to go on trying while MLflow is away.

        Raises:
            TrackingAway: it still is.
            UserError: what ``find`` raised.
        """
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        self._thread.join()
        if isinstance(self._problem, UserError):
            raise self._problem
        if self._problem is not None:
            raise _away(self._client, self._folder, self._problem) from self._problem

    def __enter__(self) -> LedgerSync:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close(timeout=2.0)
        except (TrackingAway, UserError) as problem:
            logger.warning("%s", problem)

    def _work(self) -> None:
        pause = 0.0
        while True:
            closing = self._closing.wait(pause)
            if self._attempt():
                if closing:
                    return
                pause = self._interval
            elif not closing:
                pause = min(max(2 * pause, self._interval), _MAX_PAUSE)
            elif time.monotonic() >= self._deadline:
                return
            else:
                time.sleep(0.5)

    def _attempt(self) -> bool:
        try:
            if self._run is None:
                self._run = self._find()
                self._read_known(self._run)
            carried = self._carry_metrics(self._run) + self._carry_previews(self._run)
        except Exception as error:  # Tracking never ends a training: whatever it is, close() tells.
            if self._problem is None:
                logger.warning(
                    "MLflow did not take metrics (%s); the run goes on, and they wait in %s",
                    _reason(error),
                    self._folder,
                )
            self._problem = error
            self._forget()
            return False
        if self._problem is not None:
            logger.warning("MLflow is back and has everything of %s (%d new values)", self._folder, carried)
            self._problem = None
        return True

    def _forget(self) -> None:
        self._run, self._seen = None, None
        self._known, self._previews = {}, set()

    def _read_known(self, run: TrackedRun) -> None:
        for key in self._client.get_run(run.run_id).data.metrics:
            history = self._client.get_metric_history(run.run_id, key)
            self._known[key] = {entry.step for entry in history}
        names = [artifact.path for artifact in self._client.list_artifacts(run.run_id, "images")]
        self._previews = {int(found[1]) for name in names if (found := re.search(r"preview\+step\+(\d+)\+", name))}

    def _carry_metrics(self, run: TrackedRun) -> int:
        path = self._folder / "metrics.jsonl"
        seen = _state(path)
        if seen == self._seen:
            return 0
        new = {
            (key, entry.images): Metric(key, float(value), int(entry.time * 1000), entry.images)
            for entry in ledger.read(path)
            for key, value in entry.metrics.items()
            if entry.images not in self._known.get(key, ())
        }
        for part in _parts(list(new.values()), _BATCH["metrics"]):
            self._client.log_batch(run.run_id, metrics=part, synchronous=True)
            for metric in part:
                self._known.setdefault(metric.key, set()).add(metric.step)
        self._seen = seen
        return len(new)

    def _carry_previews(self, run: TrackedRun) -> int:
        files = {int(path.stem): path for path in self._folder.glob("previews/*.png") if path.stem.isdigit()}
        new = sorted(files.keys() - self._previews)
        for step in new:
            with Image.open(files[step]) as image:
                self._client.log_image(run.run_id, image, key="preview", step=step, synchronous=True)
            self._previews.add(step)
        return len(new)


def _experiment(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        # A server knows where its artifacts go; beside a sqlite file they go next to it, not into the current folder.
        database = _sqlite_file(client.tracking_uri)
        location = None if database is None else (database.parent / "mlartifacts").as_uri()
        try:
            # Without this tag MLflow's page asks what kind of experiment it is.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return client.create_experiment(name, artifact_location=location, tags=kind)
        except MlflowException as error:
            # Another process was faster, or something is wrong.
            found = client.get_experiment_by_name(name)
            if found is None:
                raise error from None
    if found.lifecycle_stage != "active":
        raise UserError(
            f"tracking.experiment: found '{name}' deleted in MLflow, expected an active one; restore it with"
            f" `mlflow experiments restore --experiment-id {found.experiment_id}` or take another name."
        )
    return str(found.experiment_id)


def _lock_of(address: str) -> Path:
    """One process of this machine (and user) at a time creates things in a store."""
    database = _sqlite_file(address)
    name = hashlib.sha256(address.encode()).hexdigest()[:16]
    shared = Path(tempfile.gettempdir()) / f"dvdp-{os.getuid()}-{name}.lock"
    return database.with_name(f"{database.name}.lock") if database else shared


def _sqlite_file(address: str) -> Path | None:
    return Path(address.removeprefix("sqlite:///")).resolve() if address.startswith("sqlite:///") else None


def _parts(entries: list[Any], size: int) -> Iterable[list[Any]]:
    return (entries[start : start + size] for start in range(0, len(entries), size))


def _state(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever the file does."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _is_away(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, requests.RequestException):
            return True
        if isinstance(error, MlflowException) and error.get_http_status_code() in (429, 500, 502, 503, 504):
            return True
        error = error.__cause__ or error.__context__
    return False


def _away(client: MlflowClient, folder: Path, error: Exception) -> TrackingAway:
    return TrackingAway(
        f"tracking: MLflow at {_public(client.tracking_uri)} did not take everything ({_reason(error)}); it is all in"
        f" {folder}, and running the same command again replays it."
    )


def _reason(error: Exception) -> str:
    first = _public((str(error).splitlines() or [""])[0]) or type(error).__name__
    return first if len(first) <= 200 else f"{first[:200]}..."


def _public(text: str) -> str:
    """Without the name and password that an address may hold."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def _git(project: Path | str, *arguments: str) -> str:
    with contextlib.suppress(FileNotFoundError):
        command = ["git", "-C", str(project), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return ""
