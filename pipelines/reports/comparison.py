"""Settings side by side: the table that everything else shows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dvdp.config import Run, Start
from dvdp.evaluation.intervals import CONFIDENCE, Estimate, better, difference, over_seeds
from dvdp.evaluation.likelihood import METRIC
from dvdp.evaluation.records import ScoreRecord, mean_and_spread, score_differences
from dvdp.evaluation.reference import Anchor
from dvdp.models.flops import ddpm_step_flops, relative_flops, sample_flops, training_images
from pipelines.jobs.job import Job
from pipelines.jobs.timing import Timing, timing

#: A speed-up of up to so much above its bound is taken for the bound.
ERROR = 1.05


@dataclass(frozen=True)
class Result:
    """What came of one job."""

    job: Job
    record: ScoreRecord
    problem: str = ""
    """Why the run could not be put into MLflow; empty if it was."""


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
    estimates: dict[str, Estimate]
    """The same with their intervals, without the errors that these are made of."""
    timing: Timing | None
    """Of one worker with nothing beside it; None where nothing was measured."""
    training_speedup: float | None
    """Over DDPM in this comparison, per step, by :attr:`timing`; None without one, or where it is not reliable."""
    training_bound: float
    """What the FLOPs allow."""
    sampling_speedup: float | None
    sampling_bound: float
    same_terms: bool
    """Whether its score was made on the same terms as the first setting's."""
    start: Start | None = None
    """What it started from; None for random weights."""


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
    own, base = timing(group[0].job), timing(ddpm[0].job) if ddpm else None
    bounds = 1 / relative_flops(run), sampling_bound(run)
    training, sampling = _speedups(own, base, *bounds)
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
        estimates={
            name: over_seeds([_estimate(r.record, name, len(group)) for r in group])
            for name in names
            if not name.endswith("_error")
        },
        timing=own,
        training_speedup=training,
        training_bound=bounds[0],
        sampling_speedup=sampling,
        sampling_bound=bounds[1],
        same_terms=not any(score_differences(terms, result.record) for result in group),
        start=run.start,
    )


def _estimate(record: ScoreRecord, name: str, seeds: int) -> Estimate:
    """Of one seed. The images of the likelihood are those of all seeds: no mean over these lowers their error."""
    found = record.estimate_of(name)
    return found._replace(error=found.error * math.sqrt(seeds)) if name == METRIC else found


def _speedups(
    own: Timing | None, base: Timing | None, training_bound: float, sampling_bound: float
) -> tuple[float | None, float | None]:
    """Of training and of sampling, as far as they are reliable."""
    if own is None or base is None or own.device != base.device:
        return None, None
    return (
        reliable(base.seconds_per_step / own.seconds_per_step, training_bound),
        reliable(base.seconds_per_sample / own.seconds_per_sample, sampling_bound),
    )


def reliable(speedup: float, bound: float) -> float | None:
    """A measured speed-up is at most its bound; None where it exceeds that by more than timing errs."""
    return min(speedup, bound) if speedup < ERROR * bound else None


def sampling_bound(run: Run) -> float:
    """How much faster than DDPM at the same number of steps the FLOPs allow sampling to be."""
    return run.sampling.steps * ddpm_step_flops(run) / sample_flops(run)


def table(rows: Sequence[Row], primary: str) -> tuple[list[str], list[list[str]]]:
    """Headings and cells, for people; see :func:`legend`."""

    def speedup(measured: float | None, bound: float) -> str:
        return f"{measured:.2f}x of {bound:.2f}x" if measured is not None else f"- of {bound:.2f}x"

    suffix = primary.removeprefix("fid").removeprefix("fd")
    precision, recall = f"precision{suffix}", f"recall{suffix}"
    headings = [
        "setting", "turning points", f"{primary} ↓", "precision", "recall", "images", "s / step", "s / sample",
        "training speed-up", "sampling speed-up",
    ]  # fmt: skip
    bits = [METRIC] if any(METRIC in row.metrics for row in rows) else []
    headings[5:5] = ["bits / dim ↓" for _ in bits]
    leaders = tied(rows) if sum(row.same_terms for row in rows) > 1 else []
    cells = [
        [
            row.setting + (" ★" if leaders == [row] else "") + (" ‡" if row.start else ""),
            ", ".join(map(str, row.turning_points)) or "none",
            row.estimate.text + ("" if row.same_terms else " †"),
            row.estimates[precision].text if precision in row.metrics else "-",
            row.estimates[recall].text if recall in row.metrics else "-",
            *(row.estimates[name].text if name in row.metrics else "-" for name in bits),
            f"{row.images:,}",
            f"{row.timing.seconds_per_step:.3g}" if row.timing else "-",
            f"{row.timing.seconds_per_sample:.3g}" if row.timing else "-",
            speedup(row.training_speedup, row.training_bound),
            speedup(row.sampling_speedup, row.sampling_bound),
        ]
        for row in rows
    ]
    return headings, cells


def likelihoods(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]] | None:
    """Headings and cells of the bounds term by term, in the order of sampling; None where there are none."""
    known = [row for row in rows if METRIC in row.metrics]
    if not known:
        return None
    levels = max(len(row.turning_points) for row in known)
    lifted = [part for k in range(levels, 0, -1) for part in (f"level_{k}", f"lift_{k}")]
    parts = ["prior", *lifted, "level_0", "decoder"]
    return ["setting", "bits / dim ↓", *(part.replace("_", " ") for part in parts)], [
        [
            row.setting,
            row.estimates[METRIC].text,
            *(f"{row.metrics[f'{METRIC}_{part}']:.4f}" if f"{METRIC}_{part}" in row.metrics else "-" for part in parts),
        ]
        for row in known
    ]


def legend(rows: Sequence[Row], record: ScoreRecord, real: Anchor | None = None) -> list[str]:
    """What the columns mean, one sentence each.

    Args:
        real: what real images score.
    """
    lines = [
        f"Scores: torch-fidelity on {record.samples:,} samples from the EMA weights"
        f" ({record.sampling.get('solver')}, {record.sampling.get('steps')} steps) against {record.references:,} real"
        f" images, features of the extractor '{record.extractor}'.",
        *_certainty(rows),
        "Times: of one worker, measured when all other work was done. A speed-up is DDPM's time of a training step, or"
        " of a sample, over the setting's, beside the bound that their FLOPs set; settings of equal training FLOPs take"
        " more steps the cheaper these are. A speed-up that was not measured, or came out more than"
        f" {100 * (ERROR - 1):.0f} % above its bound, is not given.",
    ]
    if real:
        fewer = "" if real.samples == record.samples else ", half of the data set and fewer than are scored here"
        lines.append(
            f"Real images score {real.metrics[record.headline]:.2f}, with a standard deviation of"
            f" {real.spreads[record.headline]:.2f} over {real.draws} draws: {real.samples:,} of them held out{fewer},"
            f" against the other {real.references:,}. Generated ones cannot be expected to score lower."
        )
    if METRIC in record.metrics:
        lines.append(
            "bits / dim: the variational bound on the negative log-likelihood of"
            f" {record.metrics[f'{METRIC}_images']:,.0f} images of the data set, of ancestral steps with the variance"
            f" {record.sampling.get('variance')}. Images and noise are the same for every setting, so that differences"
            " are more certain than the bounds themselves."
        )
    name = f"{record.headline}_infinity"
    ends = [
        f"{row.setting} {row.metrics[name]:.2f} ({row.metrics[f'{name}_error']:.2f})"
        for row in rows
        if name in row.metrics
    ]
    if ends:
        lines.append(
            f"Extrapolated to infinitely many samples, with the standard error of the fit: {', '.join(ends)}."
            " No score of finitely many samples compares with these."
        )
    if not all(row.same_terms for row in rows):
        lines.append("† The score was made on other terms than the first setting's and does not compare with it.")
    lines += [f"‡ {sentence}" for sentence in starts({row.setting: row.start for row in rows})]
    return lines + [f"Note: {remark}" for remark in record.warnings]


def starts(settings: Mapping[str, Start | None]) -> list[str]:
    """What settings started from and with whom they do not compare, a sentence for each start.

    Args:
        settings: what each started from.
    """
    return [
        f"{' and '.join(name for name, own in settings.items() if own == start)} started from weights that had seen"
        f" {start.seen} before, which no number here counts: they do not compare at equal training with others."
        for start in dict.fromkeys(filter(None, settings.values()))
    ]


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
        interval = f", {100 * CONFIDENCE:.0f} % interval {low:z.2f} to {high:z.2f}" if math.isfinite(low) else ""
        lines.append(
            f"No significant difference between {leader.setting} and {row.setting}"
            f" ({row.setting} is {row.score - leader.score:.2f} higher{interval})."
        )
    if not others and sum(row.same_terms for row in rows) > 1:
        lines.append("★ marks the setting whose score is lower than every other's by more than chance explains.")
    return lines
