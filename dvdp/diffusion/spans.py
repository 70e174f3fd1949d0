"""The timesteps of each level, and how many of them a sampler can visit: plain numbers, which need no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from dvdp.errors import UserError

#: How steps are shared among levels: by name, or as the NFE of each level, finest first.
Share = Literal["length", "cost"] | Sequence[int]


def level_spans(turning_points: Sequence[int], timesteps: int) -> list[tuple[int, int]]:
    """(T_k, T_{k+1}) of each level, finest first: the state lives at level k for T_k < t <= T_{k+1}.

    Raises:
        UserError: unless 0 < T_1 < .. < T_K < T.
    """
    spans = list(pairwise((0, *turning_points, timesteps)))
    if any(low >= high for low, high in spans):
        raise UserError(
            f"turning_points: found {list(turning_points)}, expected rising whole numbers"
            f" between 1 and {timesteps - 1}; put them in order and inside the range."
        )
    return spans


def level_shares(turning_points: Sequence[int], timesteps: int) -> list[float]:
    """The share of timesteps that each level holds, finest first."""
    return [(high - low) / timesteps for low, high in level_spans(turning_points, timesteps)]


def check_steps(spans: Sequence[tuple[int, int]], steps: int, share: Share) -> None:
    """Raise UserError for fewer steps than levels, more than timesteps, and NFE that do not fit."""
    timesteps = [high - low for low, high in spans]
    if not len(spans) <= steps <= sum(timesteps):
        raise UserError(
            f"steps: found {steps}, expected at least {len(spans)} (one for each level)"
            f" and at most {sum(timesteps)} (the timesteps of the process)."
        )
    if isinstance(share, str):
        if share not in ("length", "cost"):
            raise UserError(f"share: found '{share}', expected 'length', 'cost' or a list of NFE.")
        return
    given = list(share)
    fits = len(given) == len(spans) and all(1 <= n <= most for n, most in zip(given, timesteps, strict=True))
    if not fits or sum(given) != steps:
        raise UserError(
            f"share: found {given}, expected the NFE of {len(spans)} levels, finest first, each at least 1"
            f" and at most its timesteps, {timesteps}, and {steps} (steps) in all."
        )
