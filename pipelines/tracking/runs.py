"""Runs in MLflow: found or created by a tag, written to, and nested under comparisons.

Comparisons: a trained setting is a run of its own, at the top of its experiment, and belongs to as many comparisons
as one likes. A comparison is a run too, found by the hash of what it compares; it holds the table and the contact
sheet. :func:`adopt` nests the trained runs under the newest comparison they are in (``mlflow.parentRunId``, which
MLflow keeps one of) and writes links to all of them, and to MLflow's own page that lays them side by side, into the
comparison's description, which older comparisons keep.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, compress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
from mlflow import MlflowClient
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.numpy_dataset import from_numpy
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils import mlflow_tags
from PIL import Image

from dvdp.errors import UserError
from dvdp.files import locked
from dvdp.text import markdown, utf8
from pipelines.addresses import LOCAL_PAGE, mlflow_page, public
from pipelines.tracking.connection import connect, find_or_create, impatient, lock_of, sqlite_file, tracking_address

logger = logging.getLogger("dvdp.tracking")
#: Tags that runs are found by.
TRAINING_HASH = "dvdp.training_hash"
SAMPLING_HASH = "dvdp.sampling_hash"
COMPARISON_HASH = "dvdp.comparison_hash"
EVALUATION_HASH = "dvdp.evaluation_hash"
#: Tag of an evaluation: the run that it is one of.
EVALUATION_OF = "dvdp.evaluation_of"
DATASET = "dvdp.dataset"
DATASET_DIGEST = "dvdp.dataset_digest"
PARAMS_DIGEST = "dvdp.params_digest"
#: Tag of a run that is or was at work: Prefect's flow run.
FLOW_RUN = "dvdp.flow_run"
SETTING = "dvdp.setting"
SEED = "dvdp.seed"
TURNING_POINTS = "dvdp.turning_points"
#: Tag of a run that did not start from random weights: what they had seen.
START = "dvdp.start"
#: What MLflow takes in one call.
_BATCH = {"metrics": 1000, "params": 100, "tags": 100}
_MAX_PARAM = 6000
_MAX_TAG = 8000
_MAX_DIGEST = 36
Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
#: The flow run of this process, and whether it was interrupted; threads of Ray and Prefect see it too.
_flow_run = ""
_interrupted = False


@dataclass(frozen=True)
class TrackedRun:
    """A run in MLflow, and what we write to it. Every method may be called again with the same arguments."""

    client: MlflowClient
    run_id: str
    experiment_id: str

    def set_status(self, status: Status) -> None:
        """RUNNING when work goes on, then FINISHED or FAILED; what fails after an interruption is KILLED."""
        if _interrupted and status != "FINISHED":
            status = "KILLED"
        if status == "RUNNING":
            self.set_tags({FLOW_RUN: _flow_run})
            self.client.update_run(self.run_id, status=status)
        elif self.client.get_run(self.run_id).info.status != status:
            # Not again: that would move its end.
            self.client.set_terminated(self.run_id, status)

    def describe(self, text: str, name: str = "") -> None:
        """Markdown at the top of the run's page, and another name."""
        self.set_tags({mlflow_tags.MLFLOW_RUN_NOTE: cut(text)})
        if name:
            self.client.update_run(self.run_id, name=utf8(name))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tags, in place of older values."""
        entries = [RunTag(key, utf8(str(value))) for key, value in tags.items()]
        for part in _parts(entries, _BATCH["tags"]):
            self.client.log_batch(self.run_id, tags=part, synchronous=True)

    def log_params(self, tree: Mapping[str, Any]) -> None:
        """Nested params as ``section.key``.

        MLflow never changes a param: give only what the run is found by (its training hash) covers, and put the rest
        into tags. One that differs stays as it was, with a warning.
        """
        known = self.client.get_run(self.run_id).data.params
        given = {key: utf8(value)[:_MAX_PARAM] for key, value in flatten(tree).items()}
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
        with locked(lock_of(self.client.tracking_uri)):
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
    experiment_id = _experiment(client, experiment)

    def find() -> str | None:
        # Should there be several, made from several machines at once, everybody takes the same.
        order = ["attributes.start_time ASC", "attributes.run_id ASC"]
        found = client.search_runs([experiment_id], f"tags.`{key}` = '{value}'", order_by=order, max_results=1)
        return str(found[0].info.run_id) if found else None

    def create() -> str:
        tags = {key: value, mlflow_tags.MLFLOW_SOURCE_NAME: "dvdp", FLOW_RUN: _flow_run}
        return str(client.create_run(experiment_id, tags=tags, run_name=name).info.run_id)

    return TrackedRun(client, find_or_create(client, find, create, client.delete_run), experiment_id)


@contextlib.contextmanager
def of_flow_run(flow_run: str) -> Iterator[None]:
    """Runs that begin while the block lasts carry the flow run's id."""
    global _flow_run, _interrupted
    _flow_run, _interrupted = flow_run, False
    try:
        yield
    finally:
        _flow_run = ""


@contextlib.contextmanager
def killed_when_interrupted() -> Iterator[None]:
    """Where Ctrl-C, the system's word to end or Prefect's ends the block, the flow run's runs end as KILLED.

    If MLflow does not answer, the next start ends them.
    """
    global _interrupted
    try:
        yield
    except Exception:
        raise
    except BaseException:
        # First of all, as what is at work fails when its cluster goes.
        _interrupted = True
        # In a thread, which a second signal does not disturb: `timeout` sends one to the command and one to its group.
        ending = threading.Thread(target=_kill_own_runs, name="killing runs", daemon=True)
        ending.start()
        ending.join(15)
        raise


def _kill_own_runs() -> None:
    with contextlib.suppress(Exception), impatient():
        kill_runs_of(connect(), _flow_run)


def kill_runs_of(client: MlflowClient, flow_run: str) -> None:
    """What a flow run that is dead has left RUNNING becomes KILLED."""
    everywhere = [experiment.experiment_id for experiment in client.search_experiments()]
    query = f"tags.`{FLOW_RUN}` = '{flow_run}' and attributes.status = 'RUNNING'"
    for run in client.search_runs(everywhere, query) if everywhere else ():
        client.set_terminated(run.info.run_id, "KILLED")


def adopt(parent: TrackedRun, children: Mapping[str, TrackedRun], summary: str = "", title: str = "") -> None:
    """Make ``parent`` the comparison of ``children``, by name; see the top of this file.

    Args:
        summary: Markdown above the links in the parent's description.
        title: the parent's name from now on.
    """
    for child in children.values():
        child.set_tags({mlflow_tags.MLFLOW_PARENT_RUN_ID: parent.run_id})
    runs = json.dumps([child.run_id for child in children.values()], separators=(",", ":"))
    experiments = json.dumps([parent.experiment_id])
    lines = [
        f"- [{markdown(name)}]({mlflow_page('', child.experiment_id, child.run_id)})"
        for name, child in children.items()
    ]
    query = f"runs={quote(runs)}&experiments={quote(experiments)}"
    side_by_side = f"[Side by side](#/compare-runs?{query}), or one by one:"
    note = [*([summary, ""] if summary else []), side_by_side, "", *lines]
    parent.describe("\n".join(note), title)
    if len(runs) <= _MAX_TAG:
        parent.set_tags({"dvdp.children": runs})


def cut(text: str, most: int = _MAX_TAG) -> str:
    """A text in as many whole lines as MLflow takes, which itself would cut anywhere, also within a link."""
    lines = text.split("\n")
    whole = [length <= most - 2 for length in accumulate(len(line) + 1 for line in lines)]
    return "\n".join([*compress(lines, whole), *([] if all(whole) else ["…"])])


def runs_page(experiment: str) -> str:
    """The page of an experiment's runs, at the server in use or that of `make ui`; of all where MLflow is silent."""
    address = tracking_address()
    server = address if address.startswith("http") else LOCAL_PAGE
    with contextlib.suppress(Exception), impatient():
        found = connect().get_experiment_by_name(experiment)
        return mlflow_page(server, found.experiment_id if found else "")
    return mlflow_page(server)


def read_text(client: MlflowClient, run_id: str, path: str) -> str | None:
    """A text artifact at the top of a run; None where there is none."""
    if not any(artifact.path == path for artifact in client.list_artifacts(run_id)):
        return None
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run_id, path, folder)).read_text("utf-8")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as ``{"section.key": text}``; lists and the like are JSON."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _experiment(client: MlflowClient, name: str) -> str:
    with locked(lock_of(client.tracking_uri)):
        found = client.get_experiment_by_name(name)
        if found is None:
            # A server knows where its artifacts go; beside a sqlite file they go next to it, not into this folder.
            database = sqlite_file(client.tracking_uri)
            location = None if database is None else (database.parent / "mlartifacts").as_uri()
            # Without this tag MLflow's page asks what kind of experiment it is.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            try:
                return str(client.create_experiment(name, artifact_location=location, tags=kind))
            except MlflowException as error:
                # A process of another machine was faster, or something is wrong.
                found = client.get_experiment_by_name(name)
                if found is None:
                    raise error from None
    if found.lifecycle_stage != "active":
        raise UserError(
            f"tracking.experiment: found '{name}' deleted in MLflow, expected an active one; restore it with"
            f" `MLFLOW_TRACKING_URI={public(client.tracking_uri)} mlflow experiments restore --experiment-id"
            f" {found.experiment_id}` or take another name."
        )
    return str(found.experiment_id)


def _parts(entries: list[Any], size: int) -> Iterable[list[Any]]:
    return (entries[start : start + size] for start in range(0, len(entries), size))
