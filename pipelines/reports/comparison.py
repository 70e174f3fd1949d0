"""Settings side by side: the table that everything else shows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dvdp.config import Run
from dvdp.diffusion.timesteps import share_steps
from dvdp.evaluation.intervals import CONFIDENCE, Estimate, better, difference, over_seeds
from dvdp.evaluation.records import ScoreRecord, mean_and_spread, score_differences
from dvdp.models.flops import level_flops, network_flops, relative_flops, training_images
from dvdp.training import ledger
from pipelines.jobs.job import Job
from pipelines.jobs.sample import seconds_per_sample


@dataclass(frozen=True)
class Result:
    """What came of one job."""

    job: Job
    record: ScoreRecord
    problem: str = ""
    """Why the run could not be put into MLflow; empty if it was."""

    @property
    def seconds_per_image(self) -> float:
        """Of training, median over the logs."""
        rates = [entry.metrics["images_per_second"] for entry in ledger.read(self.job.folder / "metrics.jsonl")]
        return 1 / statistics.median(rates)

    @property
    def seconds_per_sample(self) -> float:
        """Of sampling, on one worker."""
        return seconds_per_sample(self.job)


@dataclass(frozen=True)
class Row:
    """One setting, over its seeds."""

    setting: str
    process: str
    turning_points: tuple[int, ...]
    seeds: int
    images: int
    """Training images."""
    score: float
    """Mean over seeds of the primary metric; lower is better."""
    spread: float
    """Standard deviation over seeds; 0 for one seed."""
    estimate: Estimate
    """The score with its interval."""
    metrics: dict[str, float]
    """Means of all metrics."""
    seconds_per_step: float
    seconds_per_image: float
    seconds_per_sample: float
    training_speedup: float | None
    """Over DDPM in this comparison, per image; None without one."""
    training_bound: float
    """What the FLOPs allow."""
    sampling_speedup: float | None
    sampling_bound: float
    same_terms: bool
    """Whether its score was made on the same terms as the first setting's."""


def compare(results: Sequence[Result]) -> list[Row]:
    """One row for each setting, in the order of the results."""
    settings = list(dict.fromkeys(result.job.run.setting for result in results))
    grouped = {name: [r for r in results if r.job.run.setting == name] for name in settings}
    ddpm = next((group for group in grouped.values() if group[0].job.run.process == "ddpm"), None)
    return [_row(group, ddpm, results[0].record) for group in grouped.values()]


def best(rows: Sequence[Row]) -> Row:
    """The setting with the lowest score among those on the same terms."""
    return min((row for row in rows if row.same_terms), key=lambda row: row.score)


def tied(rows: Sequence[Row]) -> list[Row]:
    """The best setting and those that chance may have put behind it: it leads only where it is alone."""
    leader = best(rows)
    return [row for row in rows if row is leader or (row.same_terms and not better(leader.estimate, row.estimate))]


def _row(group: Sequence[Result], ddpm: Sequence[Result] | None, terms: ScoreRecord) -> Row:
    run = group[0].job.run
    primary = group[0].record.headline
    score, spread = mean_and_spread([result.record.metrics[primary] for result in group])
    names = group[0].record.metrics
    image, sample = _means(group)
    base_image, base_sample = _means(ddpm) if ddpm else (None, None)
    return Row(
        setting=run.setting,
        process=run.process,
        turning_points=run.turning_points,
        seeds=len(group),
        images=training_images(run),
        score=score,
        spread=spread,
        estimate=over_seeds([result.record.estimate for result in group]),
        metrics={name: statistics.mean(r.record.metrics[name] for r in group) for name in names},
        seconds_per_step=image * run.training.batch,
        seconds_per_image=image,
        seconds_per_sample=sample,
        training_speedup=base_image and base_image / image,
        training_bound=1 / relative_flops(run),
        sampling_speedup=base_sample and base_sample / sample,
        sampling_bound=sampling_bound(run),
        same_terms=not any(score_differences(terms, result.record) for result in group),
    )


def _means(group: Sequence[Result]) -> tuple[float, float]:
    return (
        statistics.mean(result.seconds_per_image for result in group),
        statistics.mean(result.seconds_per_sample for result in group),
    )


def sampling_bound(run: Run) -> float:
    """How much faster than DDPM at the same number of steps the FLOPs allow sampling to be."""
    calls = share_steps(run.build_schedule(), run.sampling.steps, run.sampling.timestep_spacing, run.sampling.share)
    cost = sum(count * flops for count, flops in zip(calls, level_flops(run), strict=True))
    return run.sampling.steps * network_flops(run.reference_model, run.resolution) / cost


def table(rows: Sequence[Row], primary: str) -> tuple[list[str], list[list[str]]]:
    """Headings and cells, for people; see :func:`legend`."""

    def speedup(measured: float | None, bound: float) -> str:
        return f"{measured:.2f}x of {bound:.2f}x" if measured is not None else f"- of {bound:.2f}x"

    suffix = primary.removeprefix("fid").removeprefix("fd")
    precision, recall = f"precision{suffix}", f"recall{suffix}"
    headings = [
        "setting", "turning points", f"{primary} ↓", "precision", "recall", "images", "s / step", "ms / image",
        "s / sample", "training speed-up", "sampling speed-up",
    ]  # fmt: skip
    leaders = tied(rows) if sum(row.same_terms for row in rows) > 1 else []
    cells = [
        [
            row.setting + (" ★" if leaders == [row] else ""),
            ", ".join(map(str, row.turning_points)) or "none",
            row.estimate.text + ("" if row.same_terms else " †"),
            f"{row.metrics[precision]:.3f}" if precision in row.metrics else "-",
            f"{row.metrics[recall]:.3f}" if recall in row.metrics else "-",
            f"{row.images:,}",
            f"{row.seconds_per_step:.3f}",
            f"{1e3 * row.seconds_per_image:.2f}",
            f"{row.seconds_per_sample:.3f}",
            speedup(row.training_speedup, row.training_bound),
            speedup(row.sampling_speedup, row.sampling_bound),
        ]
        for row in rows
    ]
    return headings, cells


def legend(rows: Sequence[Row], record: ScoreRecord) -> list[str]:
    """What the columns mean, one sentence each."""
    lines = [
        f"Scores: torch-fidelity on {record.samples:,} samples from the EMA weights"
        f" ({record.sampling.get('solver')}, {record.sampling.get('steps')} steps) against {record.references:,} real"
        f" images, features of the extractor '{record.extractor}'.",
        *_certainty(rows),
        "Speed-ups: measured over DDPM in this comparison, beside what the FLOPs allow; settings that ran beside others"
        " or on another machine were slower or faster for that (benchmarks/steps.py measures them alone).",
    ]
    name = f"{record.headline}_infinity"
    ends = [
        f"{row.setting} {row.metrics[name]:.2f} ± {row.metrics[f'{name}_error']:.2f}"
        for row in rows
        if name in row.metrics
    ]
    if ends:
        lines.append(f"Extrapolated to infinitely many samples, with the standard error of the fit: {', '.join(ends)}.")
    if not all(row.same_terms for row in rows):
        lines.append("† The score was made on other terms than the first setting's and does not compare with it.")
    return lines + [f"Note: {remark}" for remark in record.warnings]


def _certainty(rows: Sequence[Row]) -> list[str]:
    """What the intervals are of, and whether they tell the best from the others."""
    if any(row.seeds > 1 for row in rows):
        source = "over seeds, so of training and samples (Student's t: of two or three seeds it is wide)"
    else:
        source = "over draws of the samples from this one training; another seed may differ by more"
    lines = [f"± is half the {100 * CONFIDENCE:.0f} % interval of the expected score, {source}."]
    if any(math.isinf(row.estimate.margin) for row in rows):
        lines.append("A score without ± was made by an earlier release and has no interval: evaluate again for one.")
    leader, *others = sorted(tied(rows), key=lambda row: row.score)
    for row in others:
        low, high = difference(row.estimate, leader.estimate)
        interval = f", {100 * CONFIDENCE:.0f} % interval {low:.2f} to {high:.2f}" if math.isfinite(low) else ""
        lines.append(
            f"No significant difference between {leader.setting} and {row.setting}"
            f" ({row.setting} is {row.score - leader.score:.2f} higher{interval})."
        )
    if not others and sum(row.same_terms for row in rows) > 1:
        lines.append("★ marks the setting whose score is lower than every other's by more than chance explains.")
    return lines
