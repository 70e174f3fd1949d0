"""Scores over turning points from all that MLflow holds, not from one comparison alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dvdp.config import Run
from dvdp.errors import UserError
from dvdp.evaluation.records import score_differences
from dvdp.models.flops import relative_flops
from pipelines.reports.comparison import Result, Row
from pipelines.reports.sweep_figures import Scored, draw_over_first_turning_point, draw_over_levels
from pipelines.tracking.history import Trained, comparable, lifts_with_the_data, trained_settings


def known_settings(results: Sequence[Result]) -> list[Trained]:
    """Settings of these results, and what MLflow knows beside: trained alike, and scored on the same terms.

    Alike is all but process, turning points and seed; subspace diffusion may also lift as its own paper does. Where
    MLflow is unavailable, the results alone.
    """
    first = results[0].job
    terms = results[0].record
    found: dict[tuple[str, tuple[int, ...]], Trained] = {}
    # Where subspace diffusion was drawn with both lifts, the one of its paper comes first.
    for result in sorted(results, key=lambda each: not lifts_with_the_data(each.job.run.process, each.record)):
        run, score = result.job.run, result.record.metrics[result.record.headline]
        if _as(run, first.run) != first.run or not comparable(terms, run.process, result.record):
            continue
        known = found.get((run.process, run.turning_points))
        if known and score_differences(known.record, result.record):
            continue
        scores = (*known.scores, score) if known else (score,)
        found[run.process, run.turning_points] = Trained(run.process, run.turning_points, scores, result.record)
    try:
        elsewhere = trained_settings(first.params, first.run, first.dataset_digest, terms)
    except UserError:
        elsewhere = []
    for setting in elsewhere:
        here = found.get((setting.process, setting.turning_points))
        if here is None or _worth(setting) > _worth(here):
            found[setting.process, setting.turning_points] = setting
    return sorted(found.values(), key=lambda setting: (setting.process, setting.turning_points))


def _worth(setting: Trained) -> tuple[bool, int]:
    """The lift of its paper first, then seeds."""
    return lifts_with_the_data(setting.process, setting.record), len(setting.scores)


def _as(run: Run, other: Run) -> Run:
    """With the name, process, turning points and seed of another; how it is sampled, the terms of the score say."""
    return replace(
        run, setting=other.setting, process=other.process, turning_points=other.turning_points, seed=other.seed,
        sampling=other.sampling,
    )  # fmt: skip


def draw_sweeps(
    folder: Path, settings: Sequence[Trained], run: Run, rows: Sequence[Row] = ()
) -> list[tuple[Path, str]]:
    """The pictures that these settings are enough for, with captions: over T_1, and over K.

    Args:
        run: any of theirs, for what a setting costs.
        rows: of the table, whose measured speed-ups are shown beside their bounds.
    """
    if not settings:
        return []
    metric = settings[0].record.headline
    drawn: list[tuple[Path, str]] = []
    ddpm = next((_mark(s, 0) for s in settings if not s.turning_points), None)
    lines: dict[str, list[Scored]] = {}
    for setting in settings:
        if len(setting.turning_points) == 1:
            lines.setdefault(setting.process, []).append(_mark(setting, setting.turning_points[0]))
    if any(len(marks) > 1 for marks in lines.values()):
        path = draw_over_first_turning_point(folder / "first_turning_point.png", lines, ddpm, metric)
        drawn.append((path, "Score over T_1 of settings with one turning point; the band is DDPM's spread over seeds"))
    levels = [s for s in settings if s.process != "subspace"]
    if len({len(s.turning_points) for s in levels}) > 2:
        scores = [_mark(s, len(s.turning_points)) for s in levels]
        runs = [replace(run, process=s.process, turning_points=s.turning_points) for s in levels]
        bounds = [Scored(len(each.turning_points), 1 / relative_flops(each), 0) for each in runs]
        speedups = [
            Scored(len(row.turning_points), row.training_speedup, 0)
            for row in rows
            if row.process != "subspace" and row.training_speedup is not None
        ]
        path = draw_over_levels(folder / "turning_points.png", scores, bounds, speedups, metric)
        drawn.append((path, "Score and speed-up over the number of turning points"))
    return drawn


def _mark(setting: Trained, x: float) -> Scored:
    label = ", ".join(map(str, setting.turning_points)) or "none"
    return Scored(x, setting.mean, setting.spread, label)
