"""Plans: what they predict is what the sampler does and what FLOPs cost; the frontier, and a network's own word."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dvdp import Process, Schedule, UserError
from dvdp.config import Run, parse_params
from dvdp.diffusion import bands
from dvdp.diffusion.solvers import SOLVERS
from dvdp.diffusion.timesteps import TIMESTEP_SPACINGS, share_steps
from dvdp.models.flops import network_flops, relative_flops, sample_flops
from dvdp.planning.fisher import orthogonal_divergences
from dvdp.planning.planner import Plan, Planner, band_errors, generated_std, lift_losses, overall_error
from dvdp.planning.search import candidate_points, cheapest, frontier, most_levels, search
from pipelines.reports.comparison import sampling_bound
from tests.diffusion.exact import EmpiricalDenoiser, GaussianDenoiser, digits
from tests.diffusion.strategies import few

#: Deviations of the bands of CIFAR-10, about.
DATA = (0.144, 0.25, 0.374, 0.45, 0.879)


def run_of(points: tuple[int, ...] = (), resolution: int = 32, **sampling: Any) -> Run:
    """A run whose UNet halves the resolution once."""
    tree = {
        "dataset": {"resolution": resolution},
        "settings": {"a": {"process": "dvdp", "turning_points": list(points)}},
        "model": {
            "model_channels": 8,
            "channel_mult": [1, 2],
            "attention_factors": [],
            "num_head_channels": 8,
            "num_classes": 0,
        },
        "sampling": {"steps": 40, **sampling},
        "training": {"preview_steps": 10},
    }
    return parse_params(tree).runs()[0]


turning_points = st.sets(st.integers(1, 999), max_size=3).map(lambda points: tuple(sorted(points)))


@few
@given(
    turning_points, st.sampled_from(sorted(SOLVERS)), st.sampled_from(sorted(TIMESTEP_SPACINGS)), st.sampled_from("abc")
)
def test_a_plan_predicts_what_its_schedule_alone_does(
    points: tuple[int, ...], solver: str, timestep_spacing: str, which: str
) -> None:
    """Whatever other sets the planner serves; and the lift is as the run says."""
    how: dict[str, Any] = {
        "steps": 12,
        "solver": solver,
        "timestep_spacing": timestep_spacing,
        "share": "cost" if which == "a" else "length",
    }
    lift = "data" if which == "b" else "noise"
    run = run_of(lift=lift, **how)
    plan = Planner(run, DATA, sorted({*points, 100, 300, 600})).plan(points)
    schedule = Schedule.dvdp(points)
    expected = band_errors(schedule, DATA, **how, lift=lift)
    assert plan.band_errors == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert plan.lift_losses == pytest.approx(lift_losses(schedule, DATA, 32))


def test_bands_of_the_coarsest_level_are_as_one_band_each() -> None:
    """A set of few turning points is judged on all bands of the data, like the others."""
    found = generated_std(Schedule.dvdp([300]), DATA, 25)
    for band in range(1, len(DATA)):
        assert found[band] == pytest.approx(generated_std(Schedule.dvdp([300]), [0.1, DATA[band]], 25)[1])


@few
@given(turning_points, st.sampled_from(["length", "cost"]))
def test_costs_are_those_that_training_and_sampling_have(points: tuple[int, ...], share: str) -> None:
    run = run_of(points, share=share)
    plan = Planner(run, DATA, points).plan(points)
    assert plan.training_speedup == pytest.approx(1 / relative_flops(run))
    calls = sum(n * network_flops(run.model, run.resolution >> level) for level, n in enumerate(plan.nfe))
    assert plan.sampling_speedup == pytest.approx(40 * network_flops(run.model, run.resolution) / calls)
    assert sum(plan.nfe) == 40
    measured = Planner(run, DATA, points, [8.0, 4.0, 2.0, 1.0]).plan(points)
    assert measured.training_speedup == pytest.approx(1 / sum(s / 2**k for k, s in enumerate(plan.shares)))


def test_costs_relate_to_ddpm_with_the_model_without_overrides() -> None:
    run = run_of()
    wider = dataclasses.replace(run, model=dataclasses.replace(run.model, model_channels=16))
    assert Planner(wider, DATA, ()).plan(()).training_speedup == pytest.approx(1 / relative_flops(wider))
    assert relative_flops(wider) > 2


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_no_turning_points_are_ddpm(solver: str) -> None:
    plan = Planner(run_of(solver=solver), DATA, [300, 600]).plan(())
    assert (plan.excess, plan.lift_losses) == (0, ())
    assert (plan.training_speedup, plan.sampling_speedup) == (1, 1)
    assert plan.error > 0


def test_the_overall_error_counts_coefficients() -> None:
    """As many nats as the divergence of the normal numbers, N error^2, while errors are small."""
    errors = (0.02, -0.01, 0.005)
    counts = [3 * 768, 3 * 192, 3 * 64]
    nats = sum(n * ((1 + e) ** 2 - 1 - 2 * math.log1p(e)) / 2 for n, e in zip(counts, errors, strict=True))
    assert sum(counts) * overall_error(errors, 32) ** 2 == pytest.approx(nats, rel=0.02)


def test_early_turning_points_save_more_and_lose_more() -> None:
    planner = Planner(run_of(steps=250), DATA, candidate_points(1000))
    plans = [planner.plan((T,)) for T in candidate_points(1000)]
    assert [plan.training_speedup for plan in plans] == sorted((p.training_speedup for p in plans), reverse=True)
    assert [plan.lift_losses for plan in plans] == sorted((p.lift_losses for p in plans), reverse=True)
    assert plans[0].excess > 10 * plans[-1].excess > 0


# --- the frontier -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    points = candidate_points(1000)
    return search(Planner(run_of(), DATA, points), 2, points)


def test_a_search_tries_every_set_once(plans: list[Plan]) -> None:
    assert len(plans) == len({plan.turning_points for plan in plans}) == 1 + 19 + 19 * 18 // 2
    assert plans[0].turning_points == ()


def test_nothing_beats_the_frontier_and_it_beats_all_else(plans: list[Plan]) -> None:
    def beats(a: Plan, b: Plan) -> bool:
        no_worse = a.error <= b.error and a.training_speedup >= b.training_speedup
        return no_worse and (a.error < b.error or a.training_speedup > b.training_speedup)

    best = frontier(plans)
    assert len(best) > 5
    for plan in plans:
        assert (plan in best) == (not any(beats(other, plan) for other in plans))


@pytest.mark.parametrize("tolerance", [0.002, 0.01, 0.1])
def test_the_cheapest_within_a_tolerance_is_on_the_frontier_of_turning_points(
    plans: list[Plan], tolerance: float
) -> None:
    chosen = cheapest(plans, tolerance)
    assert chosen in frontier(plans)
    assert chosen.excess <= tolerance
    assert all(p.excess > tolerance for p in plans if p.training_speedup > chosen.training_speedup)


@pytest.mark.parametrize("tolerance", [-0.01, math.nan, math.inf])
def test_a_tolerance_below_0_or_infinite_is_refused(plans: list[Plan], tolerance: float) -> None:
    with pytest.raises(UserError, match=r"^tolerance: found (-0\.01|nan|inf), expected a finite number of at least 0"):
        cheapest(plans, tolerance)


def test_a_tolerance_that_no_turning_points_meet_is_refused_with_the_one_they_do() -> None:
    points = candidate_points(1000)
    plans = search(Planner(run_of(steps=250), DATA, points), 1, points)
    with pytest.raises(UserError, match=r"^tolerance: found 1e-09, expected at least \S+, which .*\[950\]") as caught:
        cheapest(plans, 1e-9)
    named = float(re.findall(r"at least (\S+),", str(caught.value))[0])
    assert cheapest(plans, named).turning_points == (950,)


def test_levels_end_where_resolution_network_steps_or_bands_do() -> None:
    assert most_levels(run_of(), len(DATA)) == 4  # 32 px, halved once by the network
    assert most_levels(run_of(resolution=24), len(DATA)) == 2
    assert most_levels(run_of(), 3) == 2
    assert most_levels(dataclasses.replace(run_of(), sampling=run_of(steps=3).sampling), len(DATA)) == 2
    with pytest.raises(UserError, match=r"^turning_points: found 1 steps and data of 5 bands, expected at least 2"):
        most_levels(run_of(steps=1), len(DATA))
    with pytest.raises(UserError, match=r"^model\.channel_mult: found 2 stages"):
        most_levels(run_of(resolution=6), len(DATA))


@pytest.mark.parametrize(
    ("points", "costs", "text"),
    [
        ((100, 200, 300), None, r"^turning_points: found \[100, 200, 300\], expected at most 2, the bands"),
        ((100, 200), [3.0, 1.0], r"^costs: found 2 numbers, expected one for each of 3 levels"),
        ((100, 200, 300, 400, 500), None, r"^model\.channel_mult: found 2 stages"),
    ],
)
def test_a_plan_that_cannot_be_is_one_sentence(points: tuple[int, ...], costs: list[float] | None, text: str) -> None:
    with pytest.raises(UserError, match=text):
        Planner(run_of(), DATA[:3], points, costs).plan(points)


def test_candidates_are_twentieths_of_any_number_of_timesteps() -> None:
    assert candidate_points(1000) == list(range(50, 1000, 50))
    assert candidate_points(4) == [1, 2, 3]
    assert candidate_points(1) == []


# --- the orthogonal Fisher divergence ---------------------------------------------------------------------------


NORMAL = (0.3, 0.5, 0.9)


def normal_images(count: int, std: tuple[float, ...] = NORMAL) -> Tensor:
    """(count, 3, 8, 8) float64, whose bands are normal with these std."""
    z = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return bands.scale(z, torch.tensor(std, dtype=torch.float64))


SCHEDULES = {
    "ddpm": Schedule.ddpm(),
    "dvdp": Schedule.dvdp([300, 600]),
    "subspace": Schedule.subspace([300, 600]),
}
TIMES = [50, 200, 300, 301, 600, 900]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_gaussian_data_have_no_divergence(kind: str) -> None:
    process = Process(SCHEDULES[kind])
    data = NORMAL[: process.levels + 1]
    rows = orthogonal_divergences(process, GaussianDenoiser(process, data), normal_images(100, data), TIMES, 2)
    for t, row in zip(TIMES, rows, strict=True):
        dropped = [value is None for value in row]
        assert dropped == [process.level(t) > band for band in range(2)]
        # What is left is how well so many images say the deviation.
        assert all(value < 2e-3 for value in row if value is not None), (t, row)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_network_that_sees_no_data_diverges_by_what_it_misses(kind: str) -> None:
    """It takes all of x for noise: its score is -x / noise^2, and the divergence the square of the signal's share."""
    process = Process(SCHEDULES[kind])
    schedule, images = process.schedule, normal_images(100)

    def blind(x: Tensor, t: Tensor) -> Tensor:
        return x / schedule.noise[-1, int(t[0])]

    energies = bands.energies(images, 2).mean(0)
    for t, row in zip(TIMES, orthogonal_divergences(process, blind, images, TIMES, 2), strict=True):
        for band, value in enumerate(row):
            if value is not None:
                at = (min(band, process.levels), t)
                expected = (schedule.signal[at] ** 2 * energies[band] / schedule.noise[at] ** 2) ** 2
                assert value == pytest.approx(expected.item(), rel=1e-9)


def test_of_an_exact_score_the_divergence_is_how_much_longer_it_is_than_a_gaussian_one() -> None:
    """Stein's identity, for data that are some digits, and more so the less noise there is."""
    images, process = digits(6, 4), Process(Schedule.ddpm())
    many = images.repeat(200, 1, 1, 1)
    exact = EmpiricalDenoiser(process, images)
    rows = orthogonal_divergences(process, exact, many, [100, 200, 400], 1)
    found = [value for (value,) in rows if value is not None]
    assert found == sorted(found, reverse=True)
    for t, value in zip([100, 200, 400], found, strict=True):
        signal, noise = process.schedule.signal[0, t], process.schedule.noise[0, t]
        z = torch.randn(many.shape, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        eps = exact(process.diffuse(many, t, z), torch.full((len(many),), t))
        variance = signal**2 * bands.energies(images, 1).mean(0)[0] + noise**2
        longer = variance * (bands.energies(eps, 1).mean(0)[0] / noise**2) - 1
        assert value == pytest.approx(longer.item(), rel=0.05, abs=0.05)


def test_divergences_do_not_depend_on_how_images_are_batched_and_come_again() -> None:
    process = Process(Schedule.dvdp([300]))
    images, denoiser = normal_images(70), GaussianDenoiser(process, NORMAL[:2])
    first = orthogonal_divergences(process, denoiser, images, [100], 2)
    assert first == orthogonal_divergences(process, denoiser, images, [100], 2)
    assert first != orthogonal_divergences(process, denoiser, images, [100], 2, seed=1)


def test_divergences_are_those_of_a_class_conditional_denoiser() -> None:
    process = Process(Schedule.dvdp([300]))
    images, exact = normal_images(70), GaussianDenoiser(process, NORMAL[:2])
    labels, seen = torch.arange(70), []

    def class_conditional(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(labels)
        return exact(x, t)

    found = orthogonal_divergences(process, class_conditional, images, [100, 400], 2, labels=labels)
    assert found == orthogonal_divergences(process, exact, images, [100, 400], 2)
    assert torch.equal(torch.cat(seen), torch.cat([labels, labels]))


def test_guided_levels_cost_twice_in_plans_and_in_the_flops_of_a_sample() -> None:
    def guided(scale: Any) -> tuple[float, int]:
        run = guided_run((600,), scale)
        return Planner(run, DATA, [600]).plan((600,)).sampling_speedup, sample_flops(run)

    plain, coarse, both = guided(1), guided([1, 3]), guided(3)
    run = guided_run((600,), 1)
    calls = share_steps(run.build_schedule(), 40)
    fine, low = (network_flops(run.model, resolution) for resolution in (32, 16))
    assert plain[1] == calls[0] * fine + calls[1] * low
    assert coarse[1] == calls[0] * fine + 2 * calls[1] * low
    assert both[1] == 2 * plain[1]
    assert guided(0) == plain, "of two halves only one is needed"
    # DDPM is guided where the plan is.
    assert both[0] == pytest.approx(plain[0]) == pytest.approx(40 * fine / plain[1])
    assert coarse[0] == pytest.approx(2 * 40 * fine / coarse[1])
    assert sampling_bound(guided_run((600,), [1, 3])) == pytest.approx(coarse[0])


def guided_run(points: tuple[int, ...], scale: Any) -> Run:
    run = run_of(points)
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, num_classes=10),
        reference_model=dataclasses.replace(run.model, num_classes=10),
        training=dataclasses.replace(run.training, label_dropout=0.1),
        sampling=dataclasses.replace(run.sampling, guidance_scale=scale),
    )
