"""The paper's tables with ours beside them, from what MLflow holds and nothing else.

A score stands in a row's cell if its run is of the row's data set (by name), resolution, process and turning points.
All our cells of one data set in one table are of runs that were trained alike and scored on the same terms. Where
MLflow has several such groups, it is the one that differs least from the paper, then the one that fills most cells.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from tqdm import tqdm

from dvdp.config import Params, Run, ScheduleParams
from dvdp.diffusion.timesteps import share_steps
from dvdp.evaluation.records import ScoreRecord, mean_and_spread, score_differences
from dvdp.models.flops import relative_flops, training_images
from pipelines.reports.comparison import reliable, sampling_bound
from pipelines.reports.paper import TABLES, TIMESTEPS, Row, Table
from pipelines.tracking.connection import connect, reaching, there_is_a_store
from pipelines.tracking.history import Measured, read_measured, scored_entries
from pipelines.tracking.runs import DATASET, SETTING

if TYPE_CHECKING:
    from mlflow.entities import Run as Entry

#: Params in MLflow that tell runs of one setting apart.
_OF_A_SETTING = ("turning_points", "seed")
#: The linear base is the paper's; of the attenuation it tells no shape and no floor, so they are the presets'.
_PAPER = ScheduleParams()


@dataclass(frozen=True)
class Line:
    """A row of the paper, and ours for it."""

    row: Row
    seeds: tuple[Measured, ...] = ()
    """One run a seed; empty where nothing ran."""
    training_speedup: float | None = None
    """Over our DDPM beside it."""
    sampling_speedup: float | None = None
    differs: tuple[str, ...] = ()
    """Why ours does not compare with the paper's; empty if it does."""

    @cached_property
    def score(self) -> tuple[float, float]:
        """Mean and standard deviation over seeds."""
        return mean_and_spread([seed.record.metrics[seed.record.headline] for seed in self.seeds])

    @property
    def images(self) -> int:
        """Training images of a run."""
        return training_images(self.seeds[0].run)


@dataclass(frozen=True)
class Filled:
    """All tables."""

    lines: dict[Table, list[Line]]
    experiment: str
    left_out: dict[str, int]
    """Scored runs that stand in no cell, counted by data set."""
    own: list[Entry]
    """The newest of them of every data set, setting, turning points and seed."""


def fill_tables(params: Params) -> Filled:
    """Read ``tracking.experiment`` in MLflow; where there is no MLflow, all our cells are empty.

    Raises:
        TrackingUnavailable: MLflow does not answer.
    """
    entries: list[Entry] = []
    found: list[tuple[Row, Measured]] = []
    if there_is_a_store():
        client = connect()
        with reaching(client, params.cluster.storage):
            entries = scored_entries(client, params.tracking.experiment)
            candidates = [(entry, rows) for entry in entries if (rows := _rows(entry))]
            for entry, rows in tqdm(candidates, desc="scores in MLflow", unit="run", disable=None, leave=False):
                measured = read_measured(client, entry)
                if measured is not None:
                    how = measured.run.sampling.solver, measured.run.sampling.steps
                    found += [(row, measured) for row in rows if row.sampling in (None, how)]
    lines = {table: _fill(table, [(row, m) for row, m in found if row in table.rows]) for table in TABLES}
    shown = {seed.run_id for table in lines.values() for line in table for seed in line.seeds}
    others = [entry for entry in entries if entry.info.run_id not in shown]
    # The newest come first.
    own = {(data_set(e), e.data.tags.get(SETTING), *map(e.data.params.get, _OF_A_SETTING)): e for e in reversed(others)}
    left_out = Counter(map(data_set, others))
    return Filled(lines, params.tracking.experiment, dict(left_out), [*reversed(own.values())])


def data_set(entry: Entry) -> str:
    """Name and resolution."""
    return f"{entry.data.tags.get(DATASET, 'unnamed')} ({entry.data.params.get('resolution', '?')} px)"


def _rows(entry: Entry) -> list[Row]:
    """Those of the run's data set, resolution, process and turning points, however it was sampled."""
    name, logged = entry.data.tags.get(DATASET, ""), entry.data.params
    keys = tuple(logged.get(key) for key in ("process", "turning_points", "resolution"))
    return [
        row
        for table in TABLES
        for row in table.rows
        if keys == (row.process, json.dumps(row.turning_points), str(row.resolution)) and row.is_on(name)
    ]


def _fill(table: Table, found: Iterable[tuple[Row, Measured]]) -> list[Line]:
    """A line for each row of the table, in its order."""
    groups: list[list[tuple[Row, Measured]]] = []
    for entry in found:
        group = next((group for group in groups if _belong_together(group[0], entry)), None)
        if group is None:
            groups.append(group := [])
        group.append(entry)
    chosen: dict[tuple[str, int], dict[Row, dict[int, Measured]]] = {}
    # Of groups that rank alike the newest stays first.
    for group in sorted(groups, key=lambda group: _rank(table, group), reverse=True):
        rows: dict[Row, dict[int, Measured]] = {}
        # Of runs of a setting and seed the one nearest to the paper, and of these the newest, which come first.
        for row, measured in sorted(group, key=lambda entry: len(_differences(table, *entry))):
            seeds = rows.setdefault(row, {})
            # No mean over two lifts.
            if not seeds or not score_differences(next(iter(seeds.values())).record, measured.record):
                seeds.setdefault(measured.run.seed, measured)
        chosen.setdefault((group[0][0].data_set, group[0][0].resolution), rows)
    return [_line(table, row, chosen.get((row.data_set, row.resolution), {})) for row in table.rows]


def _belong_together(a: tuple[Row, Measured], b: tuple[Row, Measured]) -> bool:
    """On one data set, trained alike, and scored on the same terms but for what rows of a table differ in."""
    keys = [(row.data_set, row.resolution, row.sampling is None, measured.alike) for row, measured in (a, b)]
    return keys[0] == keys[1] and not score_differences(_terms(*a), _terms(*b))


def _terms(row: Row, measured: Measured) -> ScoreRecord:
    """What a run was scored on, without what rows of a table differ in by themselves."""
    own = {"solver", "steps"} if row.sampling else set()
    own |= {"lift"} if row.process == "subspace" else set()
    kept = {key: value for key, value in measured.record.sampling.items() if key not in own}
    # A DVDP that lifts as the paper does is beside a subspace diffusion that lifts as its own paper does.
    if kept.get("lift") == row.lift:
        del kept["lift"]
    return replace(measured.record, sampling=kept)


def _rank(table: Table, group: Sequence[tuple[Row, Measured]]) -> tuple[int, int, int]:
    differs = {text for row, measured in group for text in _differences(table, row, measured)}
    return -len(differs), len({row for row, _ in group}), len(group)


def _line(table: Table, row: Row, group: dict[Row, dict[int, Measured]]) -> Line:
    if row not in group:
        return Line(row)
    seeds = tuple(measured for _, measured in sorted(group[row].items()))
    ddpm = next((tuple(found.values()) for other, found in group.items() if other.process == "ddpm"), ())

    def speedup(name: str, bound: float) -> float | None:
        of_ddpm, ours = ([getattr(run, name) for run in runs] for runs in (ddpm, seeds))
        if not of_ddpm or None in of_ddpm + ours:
            return None
        return reliable(statistics.mean(of_ddpm) / statistics.mean(ours), bound)

    differs = _differences(table, row, seeds[0])
    run = seeds[0].run
    training = speedup("seconds_per_image", 1 / relative_flops(run))
    return Line(row, seeds, training, speedup("seconds_per_sample", sampling_bound(run)), tuple(differs))


def _differences(table: Table, row: Row, measured: Measured) -> list[str]:
    """What keeps a score from being compared with the paper's, or with ours of the presets where it does not say."""
    run, record = measured.run, measured.record
    schedule, sampling, images = run.schedule, run.sampling, training_images(run)
    solver, steps = row.sampling or ("ddpm", TIMESTEPS)
    networks, other = ("per_level", "shared") if table.two_networks else ("shared", "per_level")
    words = {"shared": "one network for all levels", "per_level": "one for each level"}
    lifts = {"noise": "a lift without the variance of the data", "data": "a lift with the variance of the data"}
    attenuated, lifted = run.process == "dvdp" and bool(run.turning_points), bool(run.turning_points)
    ancestral = sampling.solver == "ddpm"
    checks = (
        (record.extractor == "inception", f"{record.headline}, which is not FID"),
        (record.samples == table.samples, f"{record.samples:,} samples, not {table.samples:,}"),
        (sampling.steps == steps, f"{sampling.steps} steps, not {steps}"),
        (sampling.solver == solver, f"{sampling.solver}, not {solver}"),
        (not ancestral or sampling.variance == "fixed_large", f"variance {sampling.variance}, not fixed_large"),
        (sampling.solver != "ddim" or sampling.eta == 0, f"eta = {sampling.eta:g}, not 0"),
        (sampling.clip, "predicted images that are not clipped"),
        (sampling.timestep_spacing == "uniform", f"{sampling.timestep_spacing} timesteps"),
        (not lifted or _shares_by_length(run), "steps that are not shared by the lengths of the levels"),
        (not lifted or sampling.lift == row.lift, lifts[sampling.lift]),
        (not run.model.num_classes, "a class-conditional network"),
        (not sampling.guided, "classifier-free guidance"),
        (sampling.thresholding is None, "dynamic thresholding"),
        (run.model.prediction_type == "epsilon", f"the target {run.model.prediction_type}, not epsilon"),
        (schedule.timesteps == TIMESTEPS, f"T = {schedule.timesteps}, not {TIMESTEPS}"),
        (schedule.base == _PAPER.base, f"a {schedule.base} base, not {_PAPER.base}"),
        (schedule.shift == _PAPER.shift, f"a shift of the log-SNR by {schedule.shift:g}"),
        (
            not attenuated or schedule.attenuation == _PAPER.attenuation,
            f"attenuation {schedule.attenuation}, not {_PAPER.attenuation}",
        ),
        (not attenuated or schedule.floor == _PAPER.floor, f"a floor of {schedule.floor:g}, not {_PAPER.floor:g}"),
        (not lifted or run.model.networks == networks, f"{words[other]}, not {words[networks]}"),
        (not run.at_all_timesteps, "levels that are trained at all timesteps"),
        (not measured.start, f"a start from weights that had seen {measured.start}"),
        (images == row.training_images, f"{images:,} training images, not {row.training_images:,}"),
    )
    return [text for same, text in checks if not same]


def _shares_by_length(run: Run) -> bool:
    schedule, steps, spacing = run.build_schedule(), run.sampling.steps, run.sampling.timestep_spacing
    return share_steps(schedule, steps, spacing, run.sampling.share) == share_steps(schedule, steps, spacing)
