"""Which level a step trains."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvdp import Schedule
from dvdp.training.levels import BLOCK, level_of_step


@pytest.mark.parametrize("points", [[], [600], [300, 600], [250, 500, 750]])
@pytest.mark.parametrize("block", [0, 1, 7])
def test_every_aligned_block_of_steps_holds_exact_shares(points: list[int], block: int) -> None:
    schedule = Schedule.dvdp(points)
    steps = range(block * BLOCK, (block + 1) * BLOCK)
    counts = Counter(level_of_step(schedule, 3, step) for step in steps)
    assert [counts[k] / BLOCK for k in range(len(points) + 1)] == pytest.approx(schedule.shares(), abs=1e-9)


def test_shares_that_are_no_hundredths_are_met_in_the_long_run() -> None:
    schedule = Schedule.dvdp([333, 601])
    steps = 20_000
    counts = Counter(level_of_step(schedule, 0, step) for step in range(steps))
    for level, share in enumerate(schedule.shares()):
        assert counts[level] / steps == pytest.approx(share, abs=2e-3)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 10_000), st.integers(0, 5), st.integers(1, 999))
def test_the_level_of_a_step_is_a_function_of_seed_and_step(step: int, seed: int, point: int) -> None:
    schedule = Schedule.dvdp([point])
    assert level_of_step(schedule, seed, step) == level_of_step(Schedule.dvdp([point]), seed, step)


def test_the_order_within_a_block_differs_between_blocks_and_seeds() -> None:
    schedule = Schedule.dvdp([300, 600])
    orders = {
        tuple(level_of_step(schedule, seed, block * BLOCK + i) for i in range(BLOCK))
        for seed in (0, 1)
        for block in (0, 1)
    }
    assert len(orders) == 4
