"""From noise to images: the reverse process along a grid of timesteps.

A *denoiser* is any callable ``denoiser(x, t)`` with x (B, C, h, w) at the level of t, and t (B,) integer timesteps
of one level; it returns the predicted noise, of x's shape. A trained network (:mod:`dvdp.models.denoiser`), an exact
posterior and a test double are the same thing here. A class-conditional one is called ``denoiser(x, t, labels)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dvdp.diffusion import bands
from dvdp.diffusion.guidance import guided, scale_by_level, threshold
from dvdp.diffusion.process import Process, Variance
from dvdp.diffusion.randomness import ImageNoise
from dvdp.diffusion.solvers import make_solver
from dvdp.diffusion.spans import Share
from dvdp.diffusion.timesteps import step_grid
from dvdp.errors import UserError

Denoiser = Callable[..., Tensor]
#: What is known of the clean images: ``constraint(x0, level, places)`` puts it into predicted clean images (B, C, h, w)
#: of a level, which are those at some places among the n images; see :mod:`dvdp.diffusion.conditional`.
Constraint = Callable[[Tensor, int, slice], Tensor]


#: Batches of level 0, at most, whose states are worth keeping to fill a batch of a coarser level.
TOGETHER = 16


class Progress(NamedTuple):
    """What a callback sees after each function evaluation of the network, of all images or of a part of them."""

    nfe: int
    """Function evaluations of these images so far, from 1."""
    total_nfe: int
    """Function evaluations of an image in all."""
    level: int
    t: int
    """The timestep the network was called at."""
    s: int
    """The timestep that ``state`` is at."""
    state: Tensor
    """x_s, (B, C, h, w) at ``level``."""
    clean: Tensor
    """The clean image predicted from x_t, of the same level, in [-2^level, 2^level] if clipped."""


@torch.no_grad()
def sample(
    process: Process,
    denoiser: Denoiser,
    shape: Sequence[int],
    steps: int = 1000,
    solver: str = "ddpm",
    eta: float = 0.0,
    variance: Variance = "fixed_small",
    clip: bool = True,
    timestep_spacing: str = "uniform",
    share: Share = "length",
    labels: Tensor | None = None,
    guidance_scale: float | Sequence[float] = 1.0,
    guidance_rescale: float = 0.0,
    thresholding: float | None = None,
    start: tuple[Tensor, int] | None = None,
    image: tuple[Tensor, int] | None = None,
    constraint: Constraint | None = None,
    resampling: int = 1,
    jump: int = 1,
    seed: int = 0,
    first: int = 0,
    batch: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    callback: Callable[[Progress], None] | None = None,
) -> Tensor:
    """Draw images.

    Args:
        shape: (n, C, H, W) of the result.
        steps: the exact NFE (number of function evaluations of the network), at least one a level.
        solver: ``"ddpm"`` (ancestral), ``"ddim"`` (deterministic at every level unless ``eta`` is above 0), or another
            of :data:`dvdp.diffusion.solvers.SOLVERS`.
        eta: of DDIM, 0 to 1; 1 has the variance of ancestral sampling.
        variance: of ancestral sampling, the ``"fixed_small"`` or ``"fixed_large"`` choice.
        timestep_spacing: of the timesteps within a level; see :func:`dvdp.diffusion.timesteps.step_grid`.
        share: of the steps among levels; see :func:`dvdp.diffusion.timesteps.share_steps`.
        labels: (n,) classes of the images, -1 for none, for a class-conditional denoiser.
        guidance_scale: of classifier-free guidance, for all levels or for each, finest first; 1 is none. A guided step
            is one call of the denoiser with twice the images. See :mod:`dvdp.diffusion.guidance`.
        guidance_rescale: see :func:`dvdp.diffusion.guidance.guided`.
        thresholding: quantile of dynamic thresholding, in place of ``clip``; see
            :func:`dvdp.diffusion.guidance.threshold`.
        start: a state (n, C, h, w) and the turning point that it is at, in place of noise at T: of the level above
            the turning point, which is then lifted, or of the level below, as a lift would have left it. ``steps`` is
            the NFE from T; those of the levels that are left out are not made.
        image: images (n, C, H, W) in [-1, 1] and a timestep, 1 to T, that they are diffused to, in place of noise at T
            (SDEdit, Meng et al. 2022); steps before it are not made.
        constraint: applied to every predicted clean image after guidance and clipping; solvers see the result.
        resampling: times that each ``jump`` steps of a level are made, 1 or more: after all but the last the state is
            diffused back by (7), so that what is drawn and what a constraint says agree (RePaint, Lugmayr et al.
            2022). The NFE is that many times ``steps``.
        jump: steps of a level between two resamplings; a level ends with those that are left.
        clip: keep the predicted clean image in the pixel range of its level, [-2^k, 2^k].
        seed: with ``first``, names the images: image i draws all its noise from (seed, first + i).
        batch: images of level 0 that the denoiser is called with at once, and 4^k times as many of level k, which are
            as many pixels; all by default. Images do not depend on it but by rounding.
        callback: called after each evaluation; level by level, and at each for one part after another.

    Returns:
        Images (n, C, H, W), in [-1, 1] if clipped.

    Raises:
        UserError: an argument is out of range, or labels are not one for each image, or none under guidance.
    """
    n, channels, height, width = shape
    process.check_resolution(height)
    process.check_resolution(width)
    if labels is not None and labels.shape != (n,):
        raise UserError(f"labels: found {tuple(labels.shape)}, expected one for each of {n} images; give ({n},).")
    scales = scale_by_level(guidance_scale, process.levels + 1)
    if labels is None and set(scales) != {1.0}:
        raise UserError(
            f"guidance_scale: found {guidance_scale} and no labels, expected labels of a class-conditional denoiser, or"
            " 1, which is no guidance; give them."
        )
    for name, value in (("guidance_rescale", guidance_rescale), ("thresholding", thresholding or 0.0)):
        if not 0 <= value <= 1:
            raise UserError(f"{name}: found {value}, expected a number from 0 to 1.")
    for name, number in (("resampling", resampling), ("jump", jump)):
        if number < 1:
            raise UserError(f"{name}: found {number}, expected a whole number of at least 1.")
    if start is not None and image is not None:
        raise UserError("start: found it beside image, expected one of them; leave one out.")
    solve = make_solver(solver, eta, variance)
    grid = step_grid(process.schedule, steps, timestep_spacing, share)
    source = ImageNoise(seed, first, n, device)

    def normal(noise: ImageNoise, level: int) -> Tensor:
        return noise.normal((channels, height >> level, width >> level), dtype)

    if image is not None:
        clean, at = image
        if clean.shape != (n, channels, height, width) or not 1 <= at <= process.schedule.timesteps:
            raise UserError(
                f"image: found {tuple(clean.shape)} and t = {at}, expected images {tuple(shape)} and a timestep of 1 to"
                f" {process.schedule.timesteps}."
            )
        grid = _grid_from(grid, process.level(at), at)
        x = process.diffuse(clean.to(device, dtype), at, normal(source, process.level(at)))
    elif start is None:
        # The coarsest level has one band.
        x = process.schedule.noise[-1, -1].item() * normal(source, process.levels)
    else:
        x = start[0].to(device, dtype)
        grid = [part for part in grid if part[0] <= _level_to_enter(process, (height, width), x, start[1])]
    labels = None if labels is None else labels.to(device)
    total_nfe, nfe = resampling * sum(len(times) - 1 for _, times in grid), 0
    for level, times, again in _passes(grid, resampling, jump):
        table = solve(process, times, level)
        predict_noise = guided(denoiser, process, level, scales[level], guidance_rescale)
        stochastic = table.z.any(dim=1).tolist()
        of_x, history, of_z = (factors.to(device, dtype) for factors in (table.x, table.history, table.z))
        # As many pixels at once as at level 0.
        size = (batch or n) * 4**level
        states = list(x.split(size))
        conditions = [()] * len(states) if labels is None else [(part,) for part in labels.split(size)]
        for part, (x, noise) in enumerate(zip(states, source.split(size), strict=True)):
            if x.shape[-1] < width >> level:
                x = process.lift(x, level + 1, normal(noise, level))
            if again:
                x = _diffuse_again(process, x, times[-1], times[0], level, normal(noise, level))
            places = slice(part * size, part * size + len(x))
            predictions: list[Tensor] = []  # The newest first.
            for i, (t, s) in enumerate(pairwise(times)):
                eps = predict_noise(x, torch.full((len(x),), t, device=x.device), *conditions[part]).to(dtype)
                x0 = process.predict_clean(x, t, eps, level)
                if thresholding:
                    x0 = threshold(x0, thresholding, 2.0**level)
                elif clip:
                    x0 = x0.clamp(-(2.0**level), 2.0**level)
                if constraint:
                    x0 = constraint(x0, level, places)
                prediction = x0 if table.prediction_type == "sample" else process.predict_noise(x, t, x0, level)
                predictions = [prediction, *predictions[: len(history) - 1]]
                x = bands.scale(x, of_x[i])
                for weights, prediction in zip(history[:, i], predictions, strict=False):
                    x = x + bands.scale(prediction, weights)
                if stochastic[i]:
                    x = x + bands.scale(normal(noise, level), of_z[i])
                if callback:
                    callback(Progress(nfe + i + 1, total_nfe, level, t, s, x, x0))
            states[part] = x
        x, nfe = torch.cat(states), nfe + len(times) - 1
        # Each part has drawn as often.
        source.draw = noise.draw
    return x


def images_together(levels: int, batch: int) -> int:
    """Images to ask :func:`sample` for: those of full batches of the coarsest level, but of no coarser one than 2."""
    return batch * min(4**levels, TOGETHER)


def _grid_from(grid: Sequence[tuple[int, list[int]]], level: int, t: int) -> list[tuple[int, list[int]]]:
    """What is left of a grid from a timestep of a level on."""
    return [(k, [t, *(s for s in times if s < t)] if k == level else times) for k, times in grid if k <= level]


def _passes(grid: Sequence[tuple[int, list[int]]], resampling: int, jump: int) -> Iterator[tuple[int, list[int], bool]]:
    """(level, falling timesteps, whether the state is first diffused from their end back to their start)."""
    for level, times in grid:
        length = len(times) - 1 if resampling == 1 else jump
        for first in range(0, len(times) - 1, length):
            for turn in range(resampling):
                yield level, times[first : first + length + 1], turn > 0


def _diffuse_again(process: Process, x: Tensor, s: int, t: int, level: int, noise: Tensor) -> Tensor:
    """x_t given x_s of the same level, s < t (7): ``l x_s + sqrt(noise_t^2 - l^2 noise_s^2) z``."""
    (signal_t, noise_t), (signal_s, noise_s) = (process.signal_and_noise(each, level) for each in (t, s))
    ratio = signal_t / signal_s
    added = noise_t.square() - ratio.square() * noise_s.square()
    return bands.scale(x, ratio) + bands.scale(noise, added.sqrt())


def _level_to_enter(process: Process, size: tuple[int, int], x: Tensor, t: int) -> int:
    """The first level that a state at a turning point goes through."""
    for below, turning_point in enumerate(process.schedule.turning_points):
        for level in (below, below + 1):
            if t == turning_point and x.shape[-2:] == (size[0] >> level, size[1] >> level):
                return below
    raise UserError(
        f"start: found a state of {tuple(x.shape[-2:])} px at t = {t}, expected one at a turning point,"
        f" {list(process.schedule.turning_points)}, of the level above it or below it."
    )
