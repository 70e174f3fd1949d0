"""An audit: images drawn from every start, scored, and put together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from dvdp.audit.result import FREE, REAL, SOLVER, Audit, Score, solver_sampling, starts
from dvdp.audit.states import States, Subject, compare_states, describe, join, labels_of, real_images, true_states
from dvdp.data.loading import Images
from dvdp.diffusion.process import Process
from dvdp.diffusion.sampling import Denoiser, Progress, sample
from dvdp.errors import UserError
from dvdp.models.classes import Classes
from dvdp.models.pixels import to_uint8

#: Fewer images leave the covariance of the features, of at most some 30 numbers, without full rank in a half of them.
FEWEST = 64


def draw(subject: Subject, start: str, first: int, count: int) -> tuple[Tensor, dict[int, States]]:
    """Images number ``first`` on from a start, uint8 (count, 3, H, W), and the states at turning points on the way.

    The states, by k, are those of ``free`` alone. Images do not depend on how they are split over calls.
    """
    process, parts = subject.process, []
    seen: dict[int, list[States]] = {}

    def keep(progress: Progress) -> None:
        if start == FREE and progress.level and progress.s == process.schedule.span(progress.level)[0]:
            seen.setdefault(progress.level, []).append(describe(progress.state, process.levels - progress.level))

    for begin in range(first, first + count, subject.batch):
        size = min(subject.batch, first + count - begin)
        if start == REAL:
            parts.append(real_images(subject, begin, size))
            continue
        state = None
        if start != FREE:
            when, _, k = start.partition("_")
            state = (
                true_states(subject, int(k), when == "after", begin, size),
                process.schedule.turning_points[int(k) - 1],
            )
        x = sample(
            process,
            subject.denoiser,
            (size, 3, subject.resolution, subject.resolution),
            start=state,
            first=begin,
            labels=labels_of(subject, start, begin, size),
            device=subject.device,
            callback=keep,
            **subject.sampling,
        )
        parts.append(to_uint8(x).cpu())
    return torch.cat(parts), {k: join(found) for k, found in seen.items()}


def score_images(images: Dataset | Tensor, count: int, score: Callable[[Dataset], float]) -> Score:
    """The score of the first ``count`` images, and of either half of them."""
    parts = (range(count), range(count // 2), range(count // 2, count))
    value, *halves = (score(Subset(images, part)) for part in parts)  # type: ignore[arg-type]
    return Score(value, (halves[0], halves[1]))


def check_count(count: int, images: Images) -> None:
    """Raise UserError unless so many images can be audited on this data set."""
    if not FEWEST <= count <= len(images):
        raise UserError(
            f"--images: found {count}, expected at least {FEWEST} (fewer say nothing) and at most {len(images):,}, the"
            " number of images in the data set."
        )


def audit(
    process: Process,
    denoiser: Denoiser,
    images: Images,
    score: Callable[[Dataset], float],
    count: int,
    sampling: Mapping[str, Any],
    solver_steps: int | None = None,
    batch: int = 128,
    device: torch.device | str = "cpu",
    metric: str = "score",
    classes: Classes | None = None,
) -> Audit:
    """Audit a denoiser in memory; ``dvdp audit`` does the same with files, on workers.

    Args:
        images: the data set.
        score: of uint8 (3, H, W) images; lower is better.
        count: images behind every score.
        sampling: arguments of :func:`dvdp.diffusion.sampling.sample`.
        solver_steps: see :func:`solver_sampling`.
        classes: None for an unconditional denoiser.

    Raises:
        UserError: ``count`` is below :data:`FEWEST` or above the size of the data set; sampling arguments that do not
            fit.
    """
    check_count(count, images)
    subject = Subject(process, denoiser, images, sampling, batch, device, classes)
    scores: dict[str, Score] = {}
    generated: dict[int, States] = {}
    solver = solver_sampling(sampling, process.schedule.timesteps, solver_steps)
    for start in tqdm([*starts(process.levels), REAL], desc="audit", unit="start", disable=None):
        drawn, states = draw(subject, start, 0, count)
        generated |= states
        scores[start] = score_images(drawn, count, score)
    if solver is not None:
        drawn, _ = draw(dataclasses.replace(subject, sampling=solver), FREE, 0, count)
        scores[SOLVER] = score_images(drawn, count, score)
    return conclude(subject, solver, scores, generated, count, metric)


def conclude(
    subject: Subject,
    solver: Mapping[str, Any] | None,
    scores: Mapping[str, Score],
    generated: Mapping[int, States],
    count: int,
    metric: str,
    notes: Mapping[str, str] | None = None,
) -> Audit:
    """The audit from what was drawn and scored.

    Args:
        generated: states of ``free`` just before each lift, by k.
        count: images behind every score.
    """
    schedule = subject.process.schedule
    return Audit(
        metric=metric,
        images=count,
        resolution=subject.resolution,
        timesteps=schedule.timesteps,
        turning_points=schedule.turning_points,
        # As JSON gives them back: tuples become lists.
        sampling=json.loads(json.dumps(dict(subject.sampling))),
        solver=json.loads(json.dumps(solver)),
        scores=dict(scores),
        states=tuple(compare_states(subject, k, generated[k]) for k in sorted(generated)),
        notes=dict(notes or {}),
    )
