"""Everything that is asked of MLflow: settings that were trained and scored, for the planner and for the tables."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run as Entry

from dvdp.config import Params, ProcessName, Run, parse_params
from dvdp.errors import UserError
from dvdp.evaluation.records import ScoreRecord, mean_and_spread, score_differences
from dvdp.identity import training_identity
from pipelines.tracking.connection import reading, there_is_a_store
from pipelines.tracking.runs import DATASET_DIGEST, EVALUATION_OF, SETTING, START, flatten, read_text

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
        return mean_and_spread(self.scores)[0]

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 for one."""
        return mean_and_spread(self.scores)[1]


def trained_settings(params: Params, run: Run, digest: str, terms: ScoreRecord | None = None) -> list[Trained]:
    """Settings in MLflow that were trained like ``run`` but for process, turning points and seed.

    Args:
        digest: of the data set.
        terms: on which they must have been scored (extractor, samples, solver, steps), see :func:`comparable`; by
            default those that most settings share.

    Raises:
        UserError: MLflow does not answer.
    """
    if not there_is_a_store():
        return []
    found = _scored_runs(params, run, digest)
    if terms is None:
        shown = _largest_group(found)
    else:
        shown = [(alike, record) for alike, record in found if comparable(terms, alike.process, record)]
    settings: dict[tuple[ProcessName, tuple[int, ...]], dict[int, ScoreRecord]] = {}
    # The newest come first, after those that lift as their paper does.
    for alike, record in sorted(shown, key=lambda each: not lifts_with_the_data(each[0].process, each[1])):
        seeds = settings.setdefault((alike.process, alike.turning_points), {})
        # No mean over two lifts.
        if not seeds or not score_differences(next(iter(seeds.values())), record):
            seeds.setdefault(alike.seed, record)
    return [
        Trained(kind, points, tuple(r.metrics[r.headline] for r in seeds.values()), next(iter(seeds.values())))
        for (kind, points), seeds in sorted(settings.items(), key=lambda item: (item[0][0], item[0][1]))
    ]


def comparable(terms: ScoreRecord, process: ProcessName, record: ScoreRecord) -> bool:
    """Whether a score was made on the same terms, or on those but for the lift of subspace diffusion's own paper."""
    if lifts_with_the_data(process, record) and "lift" in terms.sampling:
        record = replace(record, sampling={**record.sampling, "lift": terms.sampling["lift"]})
    return not score_differences(terms, record)


def lifts_with_the_data(process: ProcessName, record: ScoreRecord) -> bool:
    """Whether it is subspace diffusion with the variance of the data in its lift, as Jing et al. have it."""
    return process == "subspace" and record.sampling.get("lift") == "data"


def _largest_group(found: Iterator[tuple[Run, ScoreRecord]]) -> list[tuple[Run, ScoreRecord]]:
    """Of runs scored on the same terms, those that are of most settings."""
    groups: list[list[tuple[Run, ScoreRecord]]] = []
    for alike, record in found:
        group = next((group for group in groups if not score_differences(group[0][1], record)), None)
        if group is None:
            groups.append(group := [])
        group.append((alike, record))
    return max(groups, key=_count_settings, default=[])


def _count_settings(group: Sequence[tuple[Run, ScoreRecord]]) -> int:
    return len({(run.process, run.turning_points) for run, _ in group})


def _scored_runs(params: Params, run: Run, digest: str) -> Iterator[tuple[Run, ScoreRecord]]:
    """Finished runs like ``run`` on the data set, with their scores, the newest first."""
    with reading("knows the trained settings") as client:
        for entry in _finished(client, params.tracking.experiment, f"tags.`{DATASET_DIGEST}` = '{digest}'"):
            alike = _alike(run, entry.data.params)
            if alike is None:
                continue
            if flatten({**training_identity(alike), "flip": params.dataset.flip}) != entry.data.params:
                continue
            text = read_text(client, entry.info.run_id, "score.json")
            if text is not None:
                with contextlib.suppress(UserError):  # of another release
                    yield alike, ScoreRecord.from_json(text)


def _finished(client: MlflowClient, experiment: str, *wanted: str) -> list[Entry]:
    """Finished runs of an experiment that meet all conditions, the newest first."""
    place = client.get_experiment_by_name(experiment)
    query = " and ".join([*wanted, "attributes.status = 'FINISHED'"])
    return list(client.search_runs([place.experiment_id], query, max_results=_MOST)) if place else []


def scored_entries(client: MlflowClient, experiment: str) -> list[Entry]:
    """Finished runs that have a score, the newest first, without evaluations of them under other terms."""
    return [
        entry
        for entry in _finished(client, experiment)
        if any(name.startswith(("fid", "fd_")) for name in entry.data.metrics) and EVALUATION_OF not in entry.data.tags
    ]


@dataclass(frozen=True)
class Measured:
    """A scored run, as MLflow knows it."""

    run_id: str
    run: Run
    record: ScoreRecord
    alike: str
    """The same for runs that differ in nothing but process, turning points, seed and sampling."""
    seconds_per_image: float | None
    """Of training, median over the logs."""
    seconds_per_sample: float | None
    start: str = ""
    """What the weights that it started from had seen; empty where they were random."""


def read_measured(client: MlflowClient, entry: Entry) -> Measured | None:
    """A scored run from its entry; None without its params or score record, or with those of another release."""
    run_id, tags = entry.info.run_id, entry.data.tags
    params_text, score_text = (read_text(client, run_id, name) for name in ("params.json", "score.json"))
    if params_text is None or score_text is None:
        return None
    with contextlib.suppress(KeyError, ValueError):  # also a UserError
        params, record = parse_params(json.loads(params_text)), ScoreRecord.from_json(score_text)
        run = params.run(tags[SETTING], int(entry.data.params["seed"]))
        # As DDPM, which sees equal images whatever a setting costs.
        ddpm = replace(run, process="ddpm", turning_points=(), seed=0)
        start = entry.data.params.get("start")
        alike = [tags[DATASET_DIGEST], params.dataset.flip, run.training.budget, training_identity(ddpm), start]
        rates = [metric.value for metric in client.get_metric_history(run_id, "images_per_second")]
        image = 1 / statistics.median(rates) if rates else None
        sample = entry.data.metrics.get("seconds_per_sample")
        return Measured(run_id, run, record, json.dumps(alike), image, sample, tags.get(START, ""))
    return None


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
