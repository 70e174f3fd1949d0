"""Which level a training step is drawn from.

All images of a step share a level, and all ranks do the same one: drawn independently, the slowest rank would set
the pace. Within each aligned block of 100 steps the levels' shares are exact (to one step), in an order shuffled by
(seed, block), so that t is uniform over 1 .. T as eq. 12 asks.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from dvdp.randomness import derive_seed, generator
from dvdp.schedule import Schedule

BLOCK = 100


def level_of_step(schedule: Schedule, seed: int, step: int) -> int:
    """The level that every rank trains at ``step`` (from 0)."""
    block, place = divmod(step, BLOCK)
    return _block(schedule.turning_points, schedule.timesteps, seed, block)[place]


@lru_cache(maxsize=2)
def _block(turning_points: tuple[int, ...], timesteps: int, seed: int, block: int) -> list[int]:
    """Levels of the block's steps: a stratified draw of t/T, one from each hundredth of the range.

    The common offset of the strata differs from block to block, so that shares which are no hundredths are met in
    the long run.
    """
    order = torch.randperm(BLOCK, generator=generator(seed, "levels", block))
    offset = derive_seed(seed, "level offset", block) / 2**63
    bounds = torch.tensor(turning_points, dtype=torch.float64) * BLOCK / timesteps
    return torch.bucketize(order.double() + offset, bounds, right=True).tolist()
