"""What a set of turning points costs and loses, before anything is trained.

The figures are those of data whose bands are independent normal numbers, for which the best denoiser and the law of
its samples are known in closed form. They bound from below the error of a trained network, and rank neither trained
settings nor rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from dvdp.grids import Share, step_grid
from dvdp.process import Process, Variance
from dvdp.rules import make_rule
from dvdp.schedule import Schedule


def generated_deviations(
    schedule: Schedule,
    deviations: Sequence[float],
    steps: int,
    rule: str = "ddpm",
    eta: float = 0.0,
    variance: Variance = "lower",
    spacing: str = "uniform",
    share: Share = "length",
    lift_deviations: Sequence[float] | None = None,
) -> list[float]:
    """Deviations of the bands of samples, where the data's bands have the given ones and the denoiser is exact.

    Every rule is linear in the state and in what it remembers, so their covariance follows a recursion, band by band.

    Args:
        deviations: of the data, per coefficient, for the K + 1 bands of the schedule, finest first.
        steps, rule, eta, variance, spacing, share, lift_deviations: as in :func:`dvdp.sampling.sample`, without
            clipping.
    """
    process, K = Process(schedule), schedule.levels
    data = torch.tensor(deviations, dtype=torch.float64)
    make = make_rule(rule, eta, variance)
    lifted = [0.0] * (K + 1) if lift_deviations is None else lift_deviations
    at_birth = schedule.noise[K:, schedule.timesteps].square()
    for level, times in step_grid(schedule, steps, spacing, share):
        if level < K:
            noise, signal = schedule.noise[level, times[0]], schedule.signal[level, times[0]]
            at_birth = torch.cat([(noise.square() + (signal * lifted[level]).square())[None], at_birth])
        table = make(process, times, level)
        order = len(table.history)
        # Of (x, p_1, p_2, ..) per band: the state and the predictions before the one at hand.
        covariance = torch.zeros(len(at_birth), order, order, dtype=torch.float64)
        covariance[:, 0, 0] = at_birth
        for i, (t, _) in enumerate(pairwise(times)):
            signal, noise = schedule.signal[level:, t], schedule.noise[level:, t]
            total = (signal * data[level:]).square() + noise.square()
            gain = (signal * data[level:].square() if table.predicts == "clean" else noise) / total
            move = torch.zeros_like(covariance)
            move[:, 0, 0] = table.x[i] + table.history[0, i] * gain
            for j in range(1, order):
                move[:, 0, j] = table.history[j, i]
                if j > 1:
                    move[:, j, j - 1] = 1.0
            if order > 1:
                move[:, 1, 0] = gain
            covariance = move @ covariance @ move.mT
            covariance[:, 0, 0] += table.z[i].square()
        at_birth = covariance[:, 0, 0]
    return at_birth.sqrt().tolist()


def band_errors(schedule: Schedule, deviations: Sequence[float], steps: int, **how: Any) -> list[float]:
    """Generated over true deviation of each band, less 1; arguments as of :func:`generated_deviations`."""
    found = generated_deviations(schedule, deviations, steps, **how)
    return [a / b - 1 for a, b in zip(found, deviations, strict=True)]


def lift_losses(schedule: Schedule, deviations: Sequence[float], side: int, channels: int = 3) -> list[float]:
    """Nats that each lift loses, T_1 first: of the true state at T_k from the lifted one, for an image of this side.

    With ``r = (signal deviation / noise)^2`` of the band that is dropped at T_k: (r - log(1 + r)) / 2 for each of its
    coefficients, of which there are 3/4 of the values of the level.
    """
    losses = []
    for band, turning_point in enumerate(schedule.turning_points):
        signal, noise = schedule.signal[band, turning_point].item(), schedule.noise[band, turning_point].item()
        r = (signal * deviations[band] / noise) ** 2
        losses.append(0.75 * channels * (side >> band) ** 2 * (r - math.log1p(r)) / 2)
    return losses
