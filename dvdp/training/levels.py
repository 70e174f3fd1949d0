"""How a training step spreads its images over the levels, and what of them goes through the network at once.

Either way t is uniform over 1 .. T in the long run, which is our choice: the paper's eq. 12 leaves the share of each
level open. Levels that are trained at all timesteps (``training.span``) have equal shares. The images of a step come in
groups, which all have the same number of images at each level, and a rank takes whole groups. So all ranks do the same;
if they drew independently, the slowest rank would set the pace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dvdp.config import LevelDraw, Run
from dvdp.diffusion.randomness import derive_seed, generator
from dvdp.diffusion.schedule import Schedule

#: Steps over which "one" meets the levels' shares.
BLOCK = 100


@dataclass(frozen=True)
class AllTimesteps:
    """In place of a schedule, whose levels share the timesteps: levels 0 .. K that all have all of them."""

    levels: int
    """K."""
    timesteps: int

    @property
    def turning_points(self) -> tuple[float, ...]:
        """Where equal shares of 0 .. T end."""
        return tuple(k * self.timesteps / (self.levels + 1) for k in range(1, self.levels + 1))

    def span(self, level: int) -> tuple[int, int]:
        """The timesteps of a level are those above the first and up to the second."""
        return 0, self.timesteps

    def shares(self) -> list[float]:
        """Of the images, finest level first."""
        return [1 / (self.levels + 1)] * (self.levels + 1)


#: What says how often and at which timesteps the levels are trained.
Spans = Schedule | AllTimesteps


def training_spans(run: Run, schedule: Schedule) -> Spans:
    """Of a run with this schedule; see ``training.span``."""
    return AllTimesteps(schedule.levels, schedule.timesteps) if run.at_all_timesteps else schedule


def level_counts(schedule: Spans, draw: LevelDraw, seed: int, step: int, images: int) -> list[int]:
    """Images of each level, finest first, among the ``images`` of a group at ``step`` (from 0).

    With "all" a count is its level's share of the images, rounded up or down and right on average: the images' places
    lie evenly over the range of t, from an offset drawn from (seed, step). With "one" all images are of one level, its
    share exact (to one step) over each aligned block of 100 steps, in an order drawn from (seed, block).
    """
    if draw == "all":
        places = torch.arange(images, dtype=torch.float64) + derive_seed(seed, "levels", step) / 2**63
        return _at(schedule, places, images).bincount(minlength=schedule.levels + 1).tolist()
    block, place = divmod(step, BLOCK)
    level = _block(schedule, seed, block)[place]
    return [images if k == level else 0 for k in range(schedule.levels + 1)]


def parts(counts: Sequence[int], at_once: int) -> list[tuple[int, slice]]:
    """What of a step goes through the network at once: levels with the places of their images, finest first.

    Level k has a quarter of the pixels of level k - 1, so its parts have up to 4^k times as many images.

    Args:
        counts: images of each level, finest first.
        at_once: images of full size in a part, at most.
    """
    found = []
    for level, places in enumerate(torch.arange(sum(counts)).split(list(counts))):
        if len(places):
            chunks = places.chunk(math.ceil(len(places) / (at_once * 4**level)))
            found += [(level, slice(int(chunk[0]), int(chunk[-1]) + 1)) for chunk in chunks]
    return found


class Draws(NamedTuple):
    """What is drawn for the images of a step, in their order: finest level first."""

    t: Tensor
    """(b,) timesteps."""
    noise: list[Tensor]
    """By level, (its images, 3, h, w) of its resolution."""

    def of(self, level: int, places: slice) -> tuple[Tensor, Tensor]:
        """Timesteps and noise of a part that :func:`parts` cut."""
        before = sum(map(len, self.noise[:level]))
        return self.t[places], self.noise[level][places.start - before : places.stop - before]


def draw(
    schedule: Spans,
    counts: Sequence[int],
    resolution: int,
    device: torch.device,
    *,
    seed: int,
    step: int,
    rank: int = 0,
    world_size: int = 1,
    groups: int = 1,
) -> Draws:
    """Timesteps and noise of a rank's images of a step, before anything is cut: parts do not shape them.

    Of each level one timestep from each of as many equal strata as all ranks have images of it: less noise in the loss
    (Kingma et al. 2021, app. I.1). The strata lie at an offset drawn from (seed, step, level), and the noise of each
    group of images is drawn from (seed, step, level, group): a step is the same on any number of ranks.

    Args:
        counts: images of each level that this rank has, finest first. Image i of a level is image i // m of group
            rank + world_size * (i % m), where m is groups / world_size.
        resolution: of full-size images, in pixels.
        groups: of images of the step, over all ranks; see :attr:`dvdp.config.TrainingParams.groups`.
    """
    t, noise = [], []
    mine = range(rank, groups, world_size)
    for level, count in enumerate(counts):
        low, high = schedule.span(level)
        side = resolution >> level
        if count:
            strata = torch.arange(count, device=device, dtype=torch.float64) * world_size
            strata += rank + derive_seed(seed, "timesteps", step, level) / 2**63
            t.append((low + 1 + strata / (count * world_size) * (high - low)).long().clamp(max=high))
        shape = (count // len(mine), 3, side, side)
        drawn = [
            torch.randn(shape, device=device, generator=generator(seed, "noise", step, level, group, device=device))
            for group in mine
        ]
        noise.append(torch.stack(drawn, dim=1).flatten(0, 1) if len(mine) > 1 else drawn[0])
    return Draws(torch.cat(t), noise)


def drop_labels(
    labels: Tensor,
    counts: Sequence[int],
    probability: float,
    *,
    seed: int,
    step: int,
    rank: int = 0,
    world_size: int = 1,
    groups: int = 1,
) -> Tensor:
    """Labels (b,) of a rank's images of a step, each -1, which is none, with a probability.

    Which are dropped is drawn from (seed, step, level, group), as the noise is; arguments as of :func:`draw`.
    """
    kept = []
    mine = range(rank, groups, world_size)
    for level, count in enumerate(counts):
        drawn = [
            torch.rand(
                count // len(mine),
                device=labels.device,
                generator=generator(seed, "label dropout", step, level, group, device=labels.device),
            )
            for group in mine
        ]
        kept.append(torch.stack(drawn, dim=1).flatten() >= probability)
    return torch.where(torch.cat(kept), labels, -1)


@lru_cache(maxsize=2)
def _block(schedule: Spans, seed: int, block: int) -> list[int]:
    # The offset differs from block to block, so that shares which are no hundredths are met in the long run.
    offset = derive_seed(seed, "level offset", block) / 2**63
    order = torch.randperm(BLOCK, generator=generator(seed, "levels", block))
    return _at(schedule, order.double() + offset, BLOCK).tolist()


def _at(schedule: Spans, places: Tensor, end: int) -> Tensor:
    """Levels at places between 0 and ``end``, which stand for 0 and T."""
    bounds = torch.tensor(schedule.turning_points, dtype=torch.float64) * end / schedule.timesteps
    return torch.bucketize(places, bounds, right=True)
