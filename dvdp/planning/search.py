"""Which turning points to take: a search over sets of them, and what is best at each speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

from tqdm import tqdm

from dvdp.config import Run
from dvdp.errors import UserError
from dvdp.planning.planner import Plan, Planner

#: The sets of the paper's tables, for T = 1000.
PAPER_CHOICES = ((600,), (300, 600), (250,), (250, 500), (250, 500, 750), (200, 400, 600, 800))
#: Turning points that are tried are multiples of T over this.
PARTS = 20


def candidate_points(timesteps: int) -> list[int]:
    """Turning points to try: twentieths of T (multiples of 50 for T = 1000)."""
    return sorted({round(timesteps * part / PARTS) for part in range(1, PARTS)} - {0, timesteps})


def most_levels(run: Run, bands: int) -> int:
    """How many turning points a plan can have.

    Args:
        bands: of the data whose std are known.

    Raises:
        UserError: none, because the images or what the network makes of them cannot be halved.
    """
    levels = 0
    while levels + 1 < min(bands, run.sampling.steps) and _fits(run, levels + 1):
        levels += 1
    if levels == 0:
        run.model.check_resolution(run.resolution, 1)
        raise UserError(
            f"turning_points: found {run.sampling.steps} steps and data of {bands} bands, expected at least 2 of each"
            " for one turning point."
        )
    return levels


def search(planner: Planner, levels: int, points: Sequence[int]) -> list[Plan]:
    """The plan of every set of up to ``levels`` of the points, which the planner knows; first of all, that of none."""
    sets = [chosen for count in range(levels + 1) for chosen in combinations(sorted(points), count)]
    # Some thousands take seconds.
    return [planner.plan(chosen) for chosen in tqdm(sets, desc="plan", unit="set", delay=2, disable=None)]


def frontier(plans: Sequence[Plan]) -> list[Plan]:
    """The plans that none beats in error and training speed-up at once, the nearest to the data (slowest) first."""
    best: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.error, -plan.training_speedup)):
        if not best or plan.training_speedup > best[-1].training_speedup:
            best.append(plan)
    return best


def cheapest(plans: Sequence[Plan], tolerance: float) -> Plan:
    """The plan with turning points that trains fastest among those whose error exceeds DDPM's by the tolerance at most.

    Raises:
        UserError: the tolerance is negative or infinite, or met by no turning points.
    """
    if not 0 <= tolerance < math.inf:
        raise UserError(
            f"tolerance: found {tolerance}, expected a finite number of at least 0, the error that turning points may"
            " add to DDPM's, such as 0.01."
        )
    turning = [plan for plan in plans if plan.turning_points]
    within = [plan for plan in turning if plan.excess <= tolerance]
    if not within:
        nearest = min(turning, key=lambda plan: plan.excess)
        # 1 % more, so that the number works once it is rounded.
        raise UserError(
            f"tolerance: found {tolerance}, expected at least {1.01 * nearest.excess:.3g}, which turning points of"
            f" {list(nearest.turning_points)} need; raise it, or train DDPM."
        )
    return max(within, key=lambda plan: (plan.training_speedup, -plan.error))


def _fits(run: Run, levels: int) -> bool:
    try:
        run.model.check_resolution(run.resolution, levels)
    except UserError:
        return False
    return True
