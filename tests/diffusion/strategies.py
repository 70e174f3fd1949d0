"""Hypothesis strategies that the method's tests share."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from dvdp import Schedule
from dvdp.diffusion.schedule import ATTENUATIONS

#: The same few examples on every run.
few = settings(max_examples=30, deadline=None, derandomize=True)


def images(resolution: int, batch: int, channels: int, seed: int) -> Tensor:
    """(batch, channels, side, side) float64, standard normal."""
    return torch.randn(
        batch, channels, resolution, resolution, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


seeds = st.integers(0, 2**32)


@st.composite
def schedules(draw: st.DrawFn, timesteps: st.SearchStrategy[int], max_levels: int = 3) -> Schedule:
    """Any of the three processes, with any turning points, base, shift, attenuation and floor."""
    T = draw(timesteps)
    points = sorted(draw(st.sets(st.integers(1, T - 1), max_size=min(max_levels, T - 1)))) if T > 1 else []
    base, shift = draw(st.sampled_from(["linear", "cosine"])), draw(st.floats(-6, 3))
    kind = draw(st.sampled_from(["dvdp", "dvdp", "subspace", "ddpm"]))
    if kind == "ddpm":
        return Schedule.ddpm(T, base, shift)
    if kind == "subspace":
        return Schedule.subspace(points, T, base, shift)
    shape = draw(st.sampled_from(sorted(ATTENUATIONS)))
    return Schedule.dvdp(points, T, base, shift, shape, floor=draw(st.floats(0.005, 1)))
