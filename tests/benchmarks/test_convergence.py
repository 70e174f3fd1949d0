"""Errors of all solvers fall with their order, and are drawn."""

from __future__ import annotations

import math

import pytest

from benchmarks.convergence import ALL, error, law_error


@pytest.mark.parametrize(
    ("solver", "order"),
    [("ddpm", 1), ("ddim", 1), ("sde-dpm++2m", 2), ("dpm++2m", 2), ("deis2", 2), ("deis3", 2)],
)
def test_std_of_bands_converges_with_the_order_of_the_solver(solver: str, order: int) -> None:
    """For noisy solvers too, of which single images converge to nothing."""
    coarse, fine = law_error(solver, 100), law_error(solver, 400)
    assert math.log(coarse / fine) / math.log(4) > order - 0.2, (coarse, fine)


def test_second_order_with_noise_is_nearer_than_first_order_without() -> None:
    errors = {solver: law_error(solver, 50) for solver in ALL}
    assert errors["sde-dpm++2m"] < errors["ddim"] / 3 < errors["ddpm"] / 3


def test_the_std_of_a_deterministic_solver_is_off_as_its_states_are() -> None:
    assert law_error("dpm++2m", 50) == pytest.approx(error("dpm++2m", 50), rel=0.5)
