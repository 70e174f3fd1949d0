"""What a set of turning points costs and loses, before anything is trained.

The figures are those of data whose bands are independent normal numbers, for which the best denoiser and the law of
its samples are known in closed form. They bound from below the error of a trained network, and rank neither trained
settings nor solvers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dvdp.config import Run
from dvdp.diffusion.process import Process, Variance
from dvdp.diffusion.schedule import Schedule
from dvdp.diffusion.solvers import Solver, make_solver
from dvdp.diffusion.spans import Share
from dvdp.diffusion.timesteps import step_grid
from dvdp.errors import UserError
from dvdp.models.flops import guided_passes, network_flops


def generated_std(
    schedule: Schedule,
    std: Sequence[float],
    steps: int,
    solver: str = "ddpm",
    eta: float = 0.0,
    variance: Variance = "fixed_small",
    timestep_spacing: str = "uniform",
    share: Share = "length",
    lift: Literal["noise", "data"] = "noise",
) -> list[float]:
    """Std of the bands of samples, where the data's bands have the given ones and the denoiser is exact.

    Args:
        std: of the data, per coefficient, for the K + 1 bands of the schedule, finest first. More of them split
            the schedule's coarsest band into bands of its own.
        steps, solver, eta, variance, timestep_spacing, share: as in :func:`dvdp.diffusion.sampling.sample`, without
            clipping.
        lift: "data" if the process of the samples has the data's ``band_std``.
    """
    recursion = _Recursion(schedule, std, make_solver(solver, eta, variance))
    return recursion.std(schedule.turning_points, step_grid(schedule, steps, timestep_spacing, share), lift)


def band_errors(schedule: Schedule, std: Sequence[float], steps: int, **how: Any) -> list[float]:
    """Generated over true deviation of each band, less 1; arguments as of :func:`generated_std`."""
    return _errors(generated_std(schedule, std, steps, **how), std)


def lift_losses(schedule: Schedule, std: Sequence[float], resolution: int, channels: int = 3) -> list[float]:
    """Nats an image that each lift loses, T_1 first: the divergence of the true state at T_k from the lifted one.

    With ``r = (signal std / noise)^2`` of the band that is dropped at T_k: (r - log(1 + r)) / 2 for each of its
    coefficients, of which there are 3/4 of the values of the level.
    """
    losses = []
    for band, turning_point in enumerate(schedule.turning_points):
        signal, noise = schedule.signal[band, turning_point].item(), schedule.noise[band, turning_point].item()
        r = (signal * std[band] / noise) ** 2
        losses.append(0.75 * channels * (resolution >> band) ** 2 * (r - math.log1p(r)) / 2)
    return losses


def overall_error(errors: Sequence[float], resolution: int) -> float:
    """Root mean square of the bands' errors over all coefficients of an image of this resolution.

    In other words, how far the deviation of a coefficient is off, as a share of it. The divergence of the generated
    normal numbers from the data's is about ``N error^2`` nats an image of N values, so that, unlike a distance between
    pixels, it does not let go of fine detail because detail is small.
    """
    coarsest = len(errors) - 1
    parts = [0.75 * 4.0**-band for band in range(coarsest)] + [4.0**-coarsest]
    return math.sqrt(sum(part * error**2 for part, error in zip(parts, errors, strict=True)))


@dataclass(frozen=True)
class Plan:
    """What is to be expected of a set of turning points; see :class:`Planner`."""

    turning_points: tuple[int, ...]
    shares: tuple[float, ...]
    """Of the timesteps that each level holds, finest first."""
    nfe: tuple[int, ...]
    """Of each level, finest first."""
    band_errors: tuple[float, ...]
    """Generated over true deviation of each band of the data, less 1, finest first."""
    error: float
    """:func:`overall_error` of the bands."""
    excess: float
    """The error less that of DDPM at the same solver and steps; below 0 where this is nearer to the data."""
    lift_losses: tuple[float, ...]
    """Nats an image that each lift loses, T_1 first."""
    training_speedup: float
    """Over DDPM, per training image."""
    sampling_speedup: float
    """Over DDPM at the same number of steps."""


class Planner:
    """Plans for one data set under one run's process, network, solver and steps; it remembers what plans share.

    Args:
        run: gives all but the turning points.
        std: of the data's bands, finest first, as :meth:`dvdp.data.store.StoreMetadata.band_std` gives
            them; more of them than a plan has bands split its coarsest band.
        points: all turning points that plans may use.
        costs: of one image through the network, level by level, finest first, in any unit, e.g. measured seconds; DDPM
            then costs as much as level 0. By default counted FLOPs, and DDPM costs those of ``run.reference_model``.

    Raises:
        UserError: the steps or the points do not fit the process.
    """

    def __init__(
        self, run: Run, std: Sequence[float], points: Sequence[int], costs: Sequence[float] | None = None
    ) -> None:
        self.run, self._data, self._costs = run, tuple(std), costs
        sampling = run.sampling
        # One schedule that turns at every point has the tables of all bands of all plans.
        kind = run.process if points else "ddpm"
        every = run.schedule.build(kind, tuple(sorted(set(points))))
        self._recursion = _Recursion(every, self._data, make_solver(sampling.solver, sampling.eta, sampling.variance))
        ddpm = run.schedule.build("ddpm", ())
        share = sampling.share if isinstance(sampling.share, str) else "length"
        grid = step_grid(ddpm, sampling.steps, sampling.timestep_spacing, share)
        self._ddpm = _errors(self._recursion.std((), grid, "noise"), self._data)

    def plan(self, turning_points: Sequence[int]) -> Plan:
        """The plan of some turning points, which are among ``points``.

        Raises:
            UserError: they do not fit the resolution of the images, the network, the steps or the data's bands.
        """
        run, points = self.run, tuple(turning_points)
        K = len(points)
        run.model.check_resolution(run.resolution, K)
        if len(self._data) <= K:
            raise UserError(
                f"turning_points: found {list(points)}, expected at most {len(self._data) - 1}, the bands of the data"
                " set whose std are known."
            )
        schedule = run.schedule.build(run.process if points else "ddpm", points)
        grid = step_grid(schedule, run.sampling.steps, run.sampling.timestep_spacing, run.sampling.share)
        nfe = tuple(len(times) - 1 for _, times in reversed(grid))
        errors = _errors(self._recursion.std(points, grid, run.sampling.lift), self._data)
        costs = [self._cost(level) for level in range(K + 1)]
        training = sum(share * cost for share, cost in zip(schedule.shares(), costs, strict=True))
        passes = [guided_passes(run.sampling.guidance(level)) for level in range(K + 1)]
        calls = sum(n * count * cost for n, count, cost in zip(passes, nfe, costs, strict=True))
        sampling = calls / run.sampling.steps
        error = overall_error(errors, run.resolution)
        return Plan(
            turning_points=points,
            shares=tuple(schedule.shares()),
            nfe=nfe,
            band_errors=tuple(errors),
            error=error,
            excess=error - overall_error(self._ddpm, run.resolution),
            lift_losses=tuple(lift_losses(schedule, self._data, run.resolution)),
            training_speedup=self._ddpm_cost() / training,
            # DDPM is guided where the plan is.
            sampling_speedup=max(passes) * self._ddpm_cost() / sampling,
        )

    def _cost(self, level: int) -> float:
        if self._costs is None:
            return network_flops(self.run.model, self.run.resolution >> level)
        if level >= len(self._costs):
            raise UserError(
                f"costs: found {len(self._costs)} numbers, expected one for each of {level + 1} levels, finest first."
            )
        return self._costs[level]

    def _ddpm_cost(self) -> float:
        return network_flops(self.run.reference_model, self.run.resolution) if self._costs is None else self._cost(0)


class _Recursion:
    """Variances of the bands of samples, for any turning points among those of a schedule.

    Args:
        schedule: turns at every point that plans use; a band with a turning point has the row of that point.
        data: std of the data's bands, finest first.
    """

    def __init__(self, schedule: Schedule, data: Sequence[float], solver: Solver) -> None:
        self._process, self._data, self._solver = Process(schedule), data, solver
        self._levels: dict[tuple[int, ...], tuple[list[list[float]], list[list[float]]]] = {}

    def std(self, points: Sequence[int], grid: Sequence[tuple[int, list[int]]], lift: str) -> list[float]:
        """Of the samples, finest band first, for a step grid with these turning points."""
        schedule, K = self._process.schedule, len(points)
        bands = range(len(self._data))
        rows = [schedule.turning_points.index(points[band]) if band < K else schedule.levels for band in bands]
        start = schedule.noise[schedule.levels, schedule.timesteps].item() ** 2
        variances = {band: start for band in bands if band >= K}
        for level, times in grid:
            if level < K:
                signal, noise = (table[rows[level], times[0]].item() for table in (schedule.signal, schedule.noise))
                variances[level] = noise**2 + (signal * self._data[level] if lift == "data" else 0.0) ** 2
            factors, terms = self._level(tuple(times))
            first = self._process.level(times[0])
            for band, variance in variances.items():
                row = rows[band] - first
                variances[band] = factors[row][band] * variance + terms[row][band]
        return [math.sqrt(variances[band]) for band in bands]

    def _level(self, times: tuple[int, ...]) -> tuple[list[list[float]], list[list[float]]]:
        """(A, B) of a level's steps, each [row][band], from the first row that is not yet dropped at their top."""
        if times not in self._levels:
            factors, terms = passage(self._process, self._solver, times, self._data)
            self._levels[times] = factors.tolist(), terms.tolist()
        return self._levels[times]


def passage(process: Process, solver: Solver, times: Sequence[int], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """What the steps of one level make of a band's variance v at their top: ``A v + B``.

    Every solver is linear in the state and in its history, so their covariance follows a recursion, band by band; and
    a solver starts afresh at every level.

    Args:
        times: of the steps, falling.
        std: of the data's bands.

    Returns:
        A and B, each (rows, bands): for every row of the schedule from the level's own on, and every deviation.
    """
    schedule, level = process.schedule, process.level(times[0])
    table = solver(process, times, level)
    signal, noise = (tables[level:, list(times[:-1])].T[..., None] for tables in (schedule.signal, schedule.noise))
    data = torch.tensor(std, dtype=torch.float64)
    total = (signal * data).square() + noise.square()
    gain = (signal * data.square() if table.prediction_type == "sample" else noise) / total
    order = len(table.history)
    # Of (x, p_1, p_2, ..): the state and the predictions before the one at hand; each step, row and band.
    move = torch.zeros(*gain.shape, order, order, dtype=torch.float64)
    move[..., 0, 0] = table.x[..., None] + table.history[0, ..., None] * gain
    for j in range(1, order):
        move[..., 0, j] = table.history[j, ..., None]
        move[..., j, j - 1] = gain if j == 1 else 1.0
    fresh = torch.zeros_like(move)
    fresh[..., 0, 0] = table.z.square()[..., None]
    # Two steps after each other are one step: halve their number until one is left.
    while len(move) > 1:
        if len(move) % 2:
            move = torch.cat([move, torch.eye(order, dtype=torch.float64).expand_as(move[:1])])
            fresh = torch.cat([fresh, torch.zeros_like(fresh[:1])])
        before, after = move[::2], move[1::2]
        fresh = after @ fresh[::2] @ after.mT + fresh[1::2]
        move = after @ before
    return move[0, ..., 0, 0].square(), fresh[0, ..., 0, 0]


def _errors(found: Sequence[float], true: Sequence[float]) -> list[float]:
    return [a / b - 1 for a, b in zip(found, true, strict=True)]
