"""From noise to images: the reverse process along a grid of timesteps.

A *denoiser* is any callable ``denoiser(x, t)`` with x (B, C, h, w) at the level of t, and t (B,) integer timesteps
of one level; it returns the predicted noise, of x's shape. A trained network (:mod:`dvdp.models.denoiser`), an exact
posterior and a test double are the same thing here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dvdp import bands
from dvdp.errors import UserError, did_you_mean
from dvdp.process import Process, StepCoefficients, Variance
from dvdp.randomness import ImageNoise
from dvdp.schedule import Schedule

Denoiser = Callable[[Tensor, Tensor], Tensor]

#: The step rules by name: ancestral sampling of DDPM, and DDIM.
RULES = ("ddpm", "ddim")


class Progress(NamedTuple):
    """What a progress callback sees after each network call."""

    call: int
    """Network calls made so far, from 1."""
    calls: int
    """Network calls in all."""
    level: int
    t: int
    """The timestep the network was called at."""
    s: int
    """The timestep that ``state`` is at."""
    state: Tensor
    """x_s, (B, C, h, w) at ``level``."""
    clean: Tensor
    """The clean image predicted from x_t, of the same level, in [-2^level, 2^level] if clipped."""


def share_steps(schedule: Schedule, steps: int) -> list[int]:
    """Network calls of each level, finest first: ``steps`` in all, by the levels' lengths, at least one each.

    Raises:
        UserError: fewer steps than levels, or more than timesteps.
    """
    lengths = [high - low for low, high in map(schedule.span, range(schedule.levels + 1))]
    if not len(lengths) <= steps <= schedule.timesteps:
        raise UserError(
            f"steps: found {steps}, expected at least {len(lengths)} (one for each level)"
            f" and at most {schedule.timesteps} (the timesteps of the process)."
        )
    ideal = [steps * length / schedule.timesteps for length in lengths]
    shares = [max(1, int(share)) for share in ideal]
    while sum(shares) != steps:
        change = 1 if sum(shares) < steps else -1
        # The level that is furthest from its ideal share in the needed direction, and can still move.
        movable = [k for k, share in enumerate(shares) if 1 <= share + change <= lengths[k]]
        shares[max(movable, key=lambda k: change * (ideal[k] - shares[k]))] += change
    return shares


def step_grid(schedule: Schedule, steps: int) -> list[tuple[int, list[int]]]:
    """(level, falling timesteps) for each level in sampling order, uniform in t within a level.

    The timesteps of level k run from T_{k+1} down to T_k, both included: every turning point is on the grid.
    """
    grid = []
    for level, count in reversed(list(enumerate(share_steps(schedule, steps)))):
        low, high = schedule.span(level)
        grid.append((level, [high - ((high - low) * i + count // 2) // count for i in range(count + 1)]))
    return grid


def sample(
    process: Process,
    denoiser: Denoiser,
    shape: Sequence[int],
    steps: int = 1000,
    rule: str = "ddpm",
    eta: float = 0.0,
    variance: Variance = "lower",
    clip: bool = True,
    seed: int = 0,
    first: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    callback: Callable[[Progress], None] | None = None,
) -> Tensor:
    """Draw images.

    Args:
        shape: (n, C, H, W) of the result; n is the batch the denoiser is called with.
        steps: the exact number of network calls, shared among levels by their length.
        rule: ``"ddpm"`` (ancestral) or ``"ddim"`` (deterministic at every level unless ``eta`` is above 0).
        eta: of DDIM, 0 to 1; 1 has the variance of ancestral sampling.
        variance: of ancestral sampling, the ``"lower"`` or ``"upper"`` choice.
        clip: keep the predicted clean image in the pixel range of its level, [-2^k, 2^k].
        seed: with ``first``, names the images: image i draws all its noise from (seed, first + i).
        callback: called after each network call.

    Returns:
        Images (n, C, H, W), in [-1, 1] if clipped.

    Raises:
        UserError: an argument is out of range.
    """
    n, channels, height, width = shape
    process.check_side(height)
    process.check_side(width)
    coefficients = _rule(process, rule, eta, variance)
    grid = step_grid(process.schedule, steps)
    source = ImageNoise(seed, first, n, device)

    def normal(level: int) -> Tensor:
        return source.normal((channels, height >> level, width >> level), dtype)

    call = 0
    with torch.no_grad():
        start = normal(process.levels)
        x = bands.scale(start, process.noise(process.schedule.timesteps, process.levels, start))
        for level, times in grid:
            if level < process.levels:
                x = process.lift(x, level + 1, normal(level))
            t_all, s_all = torch.tensor(times[:-1]), torch.tensor(times[1:])
            step = StepCoefficients(*(c.to(device, dtype) for c in coefficients(t_all, s_all, level)))
            noisy = (step.z.cpu() > 0).any(dim=1).tolist()
            for i, (t, s) in enumerate(pairwise(times)):
                eps = denoiser(x, torch.full((n,), t, device=device)).to(dtype)
                x0 = process.predict_clean(x, t, eps, level)
                if clip:
                    x0 = x0.clamp(-(2.0**level), 2.0**level)
                x = bands.scale(x, step.x[i]) + bands.scale(x0, step.x0[i])
                if noisy[i]:
                    x = x + bands.scale(normal(level), step.z[i])
                call += 1
                if callback:
                    callback(Progress(call, steps, level, t, s, x, x0))
    return x


def _rule(
    process: Process, rule: str, eta: float, variance: Variance
) -> Callable[[Tensor, Tensor, int], StepCoefficients]:
    if not 0 <= eta <= 1:
        raise UserError(f"eta: found {eta}, expected a number from 0 to 1.")
    if variance not in ("lower", "upper"):
        raise UserError(f"variance: found '{variance}', expected 'lower' or 'upper'.")
    if rule == "ddpm":
        return partial(process.posterior, variance=variance)
    if rule == "ddim":
        return partial(process.implicit, eta=eta)
    raise UserError(f"rule: found '{rule}'{did_you_mean(rule, RULES)}, expected one of {', '.join(RULES)}.")
