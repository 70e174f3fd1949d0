"""Which timesteps the reverse process visits: how many at each level, and where.

Every grid holds every turning point, T and 0; a level's part runs from T_{k+1} down to T_k. A *timestep spacing* is a
rising coordinate of t in which the steps of a level are even.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dvdp.diffusion.schedule import Schedule
from dvdp.diffusion.spans import Share, check_steps, level_spans
from dvdp.errors import UserError, did_you_mean


def _log_snr(schedule: Schedule) -> Tensor:
    """Less the log-SNR (of amplitudes) of the coarsest band, which no turning point attenuates; infinite at t = 0."""
    return (schedule.noise[-1] / schedule.signal[-1]).log()


#: The coordinate of t = 0 .. T, (T+1,), by the name of the timestep spacing.
TIMESTEP_SPACINGS: dict[str, Callable[[Schedule], Tensor]] = {
    "uniform": lambda schedule: torch.arange(schedule.timesteps + 1, dtype=torch.float64),
    "quadratic": lambda schedule: torch.arange(schedule.timesteps + 1, dtype=torch.float64).sqrt(),
    "logsnr": _log_snr,
}


def share_steps(
    schedule: Schedule, steps: int, timestep_spacing: str = "uniform", share: Share = "length"
) -> list[int]:
    """NFE of each level, finest first: ``steps`` in all, at least one each.

    Args:
        timestep_spacing: a key of :data:`TIMESTEP_SPACINGS`.
        share: ``"length"``: in proportion to the levels' lengths in the coordinate of the spacing, so that turning
            points hardly move the steps. ``"cost"``: in proportion to length over the square root of pixels, which for
            a given number of pixels makes an error that falls with one over the steps smallest. Or the NFE themselves.

    Raises:
        UserError: fewer steps than levels, or more than timesteps; NFE that do not fit.
    """
    if timestep_spacing not in TIMESTEP_SPACINGS:
        raise UserError(
            f"timestep_spacing: found '{timestep_spacing}'{did_you_mean(timestep_spacing, TIMESTEP_SPACINGS)},"
            f" expected one of {', '.join(TIMESTEP_SPACINGS)}."
        )
    spans = level_spans(schedule.turning_points, schedule.timesteps)
    check_steps(spans, steps, share)
    if not isinstance(share, str):
        return list(share)
    timesteps = [high - low for low, high in spans]
    coordinate = TIMESTEP_SPACINGS[timestep_spacing](schedule).tolist()
    lengths = [coordinate[high] - coordinate[max(low, _start(coordinate))] for low, high in spans]
    weights = [max(length, 0.0) * (2**level if share == "cost" else 1) for level, length in enumerate(lengths)]
    # A process of one timestep has no length where t = 0 has no coordinate.
    ideal = [steps * weight / (sum(weights) or 1.0) for weight in weights]
    shares = [min(most, max(1, int(part))) for part, most in zip(ideal, timesteps, strict=True)]
    while sum(shares) != steps:
        change = 1 if sum(shares) < steps else -1
        # The level that is furthest from its ideal share in the needed direction, and can still move.
        movable = [k for k, count in enumerate(shares) if 1 <= count + change <= timesteps[k]]
        shares[max(movable, key=lambda k: change * (ideal[k] - shares[k]))] += change
    return shares


def step_grid(
    schedule: Schedule, steps: int, timestep_spacing: str = "uniform", share: Share = "length"
) -> list[tuple[int, list[int]]]:
    """(level, falling timesteps) for each level in sampling order; arguments as of :func:`share_steps`."""
    shares = share_steps(schedule, steps, timestep_spacing, share)
    coordinate = TIMESTEP_SPACINGS[timestep_spacing](schedule).tolist()
    return [
        (level, _even(coordinate, *schedule.span(level), count)) for level, count in reversed(list(enumerate(shares)))
    ]


def _start(coordinate: Sequence[float]) -> int:
    """The first t that has a finite coordinate: 0 or 1."""
    return int(coordinate[0] == float("-inf"))


def _even(coordinate: Sequence[float], low: int, high: int, count: int) -> list[int]:
    """Timesteps from high to low, even in the coordinate; where t = 0 has none, one step leads there from t = 1."""
    bottom = max(low, _start(coordinate)) if count > 1 else low
    steps = count - (bottom > low)
    times = [float(high)]
    for i in range(1, steps):
        wanted = coordinate[high] + (coordinate[bottom] - coordinate[high]) * i / steps
        above = bisect_left(coordinate, wanted, bottom, high)
        part = (coordinate[above] - wanted) / (coordinate[above] - coordinate[above - 1])
        times.append(above - part)
    return _distinct([*times, float(bottom), *([float(low)] if bottom > low else [])])


def _distinct(times: Sequence[float]) -> list[int]:
    """Whole numbers near falling times, each below the one before; the ends, which are whole, stay."""
    whole = [round(t) for t in times]
    for i in range(1, len(whole)):
        whole[i] = min(whole[i], whole[i - 1] - 1)
    whole[-1] = round(times[-1])
    for i in reversed(range(len(whole) - 1)):
        whole[i] = max(whole[i], whole[i + 1] + 1)
    return whole
