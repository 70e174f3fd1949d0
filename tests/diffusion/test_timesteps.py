"""Which timesteps a sampler visits, and what it refuses before it starts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dvdp import Process, Schedule, UserError, sample
from dvdp.diffusion.timesteps import TIMESTEP_SPACINGS, share_steps, step_grid
from tests.diffusion.strategies import few, schedules


@few
@given(
    schedules(st.integers(2, 60) | st.just(1000)),
    st.floats(0, 1),
    st.sampled_from(sorted(TIMESTEP_SPACINGS)),
    st.sampled_from(["length", "cost"]),
)
def test_grid_has_exactly_the_steps_asked_for_and_every_turning_point(
    schedule: Schedule, part: float, timestep_spacing: str, share: Any
) -> None:
    K, T = schedule.levels, schedule.timesteps
    steps = K + 1 + round(part * (T - K - 1))
    grid = step_grid(schedule, steps, timestep_spacing, share)
    assert [level for level, _ in grid] == list(range(K, -1, -1))
    assert sum(len(times) - 1 for _, times in grid) == steps
    for level, times in grid:
        low, high = schedule.span(level)
        assert (times[0], times[-1]) == (high, low)
        assert all(a > b for a, b in pairwise(times))
    assert {*schedule.turning_points, 0, T} <= {t for _, times in grid for t in times}


@few
@given(schedules(st.just(1000)), st.integers(4, 1000))
def test_steps_are_shared_by_length_and_evenly_spaced(schedule: Schedule, steps: int) -> None:
    shares = share_steps(schedule, steps)
    assert min(shares) >= 1
    # Levels too short for a step of their own take theirs from the others.
    slack = 1 + sum(steps * share < 1 for share in schedule.shares())
    for count, share in zip(shares, schedule.shares(), strict=True):
        assert abs(count - steps * share) <= slack
    for level, times in step_grid(schedule, steps):
        low, high = schedule.span(level)
        even = [high + (low - high) * i / (len(times) - 1) for i in range(len(times))]
        assert all(abs(t - ideal) <= 0.5 for t, ideal in zip(times, even, strict=True))


def test_familiar_grids() -> None:
    assert step_grid(Schedule.ddpm(), 4) == [(0, [1000, 750, 500, 250, 0])]
    assert step_grid(Schedule.ddpm(), 1000) == [(0, list(range(1000, -1, -1)))]
    assert share_steps(Schedule.dvdp([300, 600]), 250) == [75, 75, 100]
    assert share_steps(Schedule.dvdp([1, 2]), 3) == [1, 1, 1]
    assert step_grid(Schedule.dvdp([300, 600]), 3) == [(2, [1000, 600]), (1, [600, 300]), (0, [300, 0])]


@pytest.mark.parametrize("timestep_spacing", sorted(TIMESTEP_SPACINGS))
def test_steps_are_even_in_the_coordinate_of_the_spacing_and_turning_points_hardly_move_them(
    timestep_spacing: str,
) -> None:
    schedule = Schedule.dvdp([300, 600])
    coordinate = TIMESTEP_SPACINGS[timestep_spacing](schedule)
    counts = share_steps(schedule, 60, timestep_spacing)
    widths = []
    for (level, times), count in zip(step_grid(schedule, 60, timestep_spacing), reversed(counts), strict=True):
        assert len(times) - 1 == count
        inside = [t for t in times if t > 20]
        widths += [(coordinate[t] - coordinate[s]).item() for t, s in pairwise(inside)]
        if level < 2:
            assert times[0] == schedule.span(level)[1]
    assert max(widths) < 1.4 * min(widths)
    # The same steps without turning points, but for rounding and the step beside each.
    ((_, plain),) = step_grid(Schedule.ddpm(), 60, timestep_spacing)
    met = {t for _, times in step_grid(schedule, 60, timestep_spacing) for t in times}
    step = {t: t - s for t, s in pairwise(plain)}
    assert all(min(abs(t - u) for u in met) <= 0.6 * width + 1 for t, width in step.items())


def test_steps_may_be_shared_by_cost_or_as_given() -> None:
    schedule = Schedule.dvdp([300, 600])
    assert share_steps(schedule, 250, share="cost") == [30, 60, 160]
    assert share_steps(schedule, 20, share=(12, 5, 3)) == [12, 5, 3]
    assert [len(times) - 1 for _, times in step_grid(schedule, 20, "quadratic", (12, 5, 3))] == [3, 5, 12]
    assert step_grid(Schedule.ddpm(), 3, "quadratic") == [(0, [1000, 444, 111, 0])]
    # The step to t = 0, where the log-SNR has no end, is the last.
    assert step_grid(Schedule.ddpm(), 5, "logsnr")[0][1][-2:] == [1, 0]


@pytest.mark.parametrize("share", [(12, 8), (12, 5, 4), (0, 10, 10), (12.0, 5, 3, 0)])
def test_given_shares_that_do_not_fit_are_refused(share: Any) -> None:
    with pytest.raises(UserError, match=r"share: found \[.*3 levels, finest first.*\[300, 300, 400\], and 20"):
        share_steps(Schedule.dvdp([300, 600]), 20, share=share)


@pytest.mark.parametrize("steps", [-1, 0, 2, 1001])
def test_too_few_or_too_many_steps_are_refused(steps: int) -> None:
    with pytest.raises(UserError) as caught:
        share_steps(Schedule.dvdp([300, 600]), steps)
    assert str(caught.value) == (
        f"steps: found {steps}, expected at least 3 (one for each level)"
        " and at most 1000 (the timesteps of the process)."
    )


def never(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    raise AssertionError("the network was called")


@pytest.mark.parametrize(
    ("names", "arguments"),
    [
        ("steps", {"steps": 2}),
        ("steps", {"steps": 1001}),
        ("solver", {"solver": "dpm"}),
        ("(did you mean 'ddim'?)", {"solver": "ddimm"}),
        ("eta", {"eta": -0.1}),
        ("eta", {"eta": 1.5}),
        ("eta", {"eta": float("nan")}),
        ("variance", {"variance": "middle"}),
        ("(did you mean 'quadratic'?)", {"timestep_spacing": "quadratc"}),
        ("share", {"share": "even"}),
        ("share", {"share": (500, 300, 100)}),
        ("image resolution", {"shape": (1, 3, 6, 8)}),
        ("image resolution", {"shape": (1, 3, 8, 6)}),
    ],
)
def test_bad_argument_is_refused_before_the_network_is_called(names: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        sample(Process(Schedule.dvdp([300, 600])), never, **{"shape": (1, 3, 8, 8), **arguments})
    text = str(caught.value)
    assert names in text
    assert text.endswith(".")
    assert "\n" not in text
