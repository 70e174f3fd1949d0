"""What MLflow knows of settings that were trained."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dvdp.config import Params, ProcessName, Run
from dvdp.errors import UserError
from dvdp.evaluation.records import ScoreRecord, score_differences
from dvdp.identity import training_identity
from pipelines.tracking.connection import TrackingUnavailable, connect, reaching
from pipelines.tracking.runs import DATASET_DIGEST, flatten, read_text

#: Of runs from before there were these keys.
_EARLIER = {"model.num_classes": "0", "training.compile": "false"}
#: Runs of a data set that are looked at, the newest first.
_MOST = 5000


@dataclass(frozen=True)
class Trained:
    """A setting that was trained and scored, over its seeds."""

    process: ProcessName
    turning_points: tuple[int, ...]
    scores: tuple[float, ...]
    """Of the headline metric, one a seed; lower is better."""
    record: ScoreRecord
    """Of one seed, for the terms that all the scores were made on."""

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.mean(self.scores)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 for one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0


def trained_settings(params: Params, run: Run, digest: str, terms: ScoreRecord | None = None) -> list[Trained]:
    """Settings in MLflow that were trained like ``run`` but for kind, turning points and seed.

    Args:
        digest: of the data set.
        terms: on which they must have been scored (extractor, samples, solver, steps); by default those that most
            settings share.

    Raises:
        UserError: MLflow does not answer.
    """
    # Without an address it is a file here, which only looking for trained settings need not create.
    if not (os.environ.get("MLFLOW_TRACKING_URI") or Path("mlflow.db").is_file()):
        return []
    groups: list[list[tuple[Run, ScoreRecord]]] = []
    for alike, record in _scored_runs(params, run, digest):
        if terms is not None and score_differences(terms, record):
            continue
        group = next((group for group in groups if not score_differences(group[0][1], record)), None)
        if group is None:
            groups.append(group := [])
        group.append((alike, record))
    settings: dict[tuple[ProcessName, tuple[int, ...]], dict[int, ScoreRecord]] = {}
    for alike, record in max(groups, key=_count_settings, default=[]):
        # The newest come first.
        settings.setdefault((alike.process, alike.turning_points), {}).setdefault(alike.seed, record)
    return [
        Trained(kind, points, tuple(r.metrics[r.headline] for r in seeds.values()), next(iter(seeds.values())))
        for (kind, points), seeds in sorted(settings.items(), key=lambda item: (item[0][0], item[0][1]))
    ]


def _count_settings(group: Sequence[tuple[Run, ScoreRecord]]) -> int:
    return len({(run.process, run.turning_points) for run, _ in group})


def _scored_runs(params: Params, run: Run, digest: str) -> Iterator[tuple[Run, ScoreRecord]]:
    """Finished runs like ``run`` on the data set, with their scores, the newest first."""
    # Seconds to import.

    try:
        client = connect()
        with reaching(client, params.cluster.storage):
            experiment = client.get_experiment_by_name(params.tracking.experiment)
            places = [experiment.experiment_id] if experiment else []
            wanted = f"tags.`{DATASET_DIGEST}` = '{digest}' and attributes.status = 'FINISHED'"
            for entry in client.search_runs(places, wanted, max_results=_MOST) if places else []:
                alike = _alike(run, entry.data.params)
                if alike is None:
                    continue
                identity = {**training_identity(alike), "flip": params.dataset.flip}
                if flatten(identity) != {**_EARLIER, **entry.data.params}:
                    continue
                text = read_text(client, entry.info.run_id, "score.json")
                if text is None:
                    continue
                with contextlib.suppress(UserError):  # of another release
                    yield alike, ScoreRecord.from_json(text)
    except TrackingUnavailable:
        raise UserError(
            "MLFLOW_TRACKING_URI: found no answer from MLflow there, which knows the trained settings, expected a"
            " server that runs; start it, or unset the variable to plan without."
        ) from None


def _alike(run: Run, logged: dict[str, str]) -> Run | None:
    """The run with the process, turning points and seed of another, unless they do not fit it."""
    try:
        process: Any = logged["process"]
        alike = replace(
            run, process=process, turning_points=tuple(json.loads(logged["turning_points"])), seed=int(logged["seed"])
        )
        alike.check()
    except (KeyError, ValueError):  # also a UserError
        return None
    return alike
