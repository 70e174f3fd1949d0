"""An audit blames what is to blame, and nothing where nothing is lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dvdp import Process, Schedule
from dvdp.audit.figure import draw_audit
from dvdp.audit.result import Audit, Score, attribute, solver_sampling, starts
from dvdp.audit.run import FEWEST, audit, draw
from dvdp.audit.states import Subject, describe, real_images, true_states
from dvdp.data.loading import ArrayImages
from dvdp.diffusion import bands
from dvdp.diffusion.randomness import generator
from dvdp.diffusion.sampling import Denoiser
from dvdp.errors import UserError
from dvdp.evaluation.fidelity import frechet
from dvdp.models.classes import Classes
from dvdp.models.pixels import to_float, to_uint8
from tests.diffusion.exact import EmpiricalDenoiser, GaussianDenoiser, digits, split

SIDE, COUNT = 16, 256
#: Of bands 0, 1, 2: pixels hardly leave [-1, 1].
DEVIATIONS = (0.2, 0.4, 0.8)
SAMPLING = {"solver": "dpm++2m", "steps": 60, "timestep_spacing": "logsnr", "clip": False, "seed": 3}
PROCESS = Process(Schedule.dvdp((100, 300)))
EXACT = GaussianDenoiser(PROCESS, DEVIATIONS)


class WrongAt:
    """Exact but at one level, where it takes the data for smaller in some bands, or for brighter."""

    def __init__(self, level: int, std: tuple[float, ...], mean: float = 0.0) -> None:
        self.level, self.wrong = level, GaussianDenoiser(PROCESS, std, torch.full((1, 3, SIDE, SIDE), mean))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return (self.wrong if PROCESS.level(int(t[0])) == self.level else EXACT)(x, t)


class WrongLift(Process):
    """Its last lift leaves out the noise of the band that comes back."""

    def lift(self, x: Tensor, level: int, noise: Tensor) -> Tensor:
        return bands.up(x) if level == 1 else super().lift(x, level, noise)


def patches(images: Dataset | Tensor) -> Tensor:
    """4 x 4 pixels of every image: they see all bands alike, and small errors little."""
    pixels = torch.stack([images[i] for i in range(len(images))])  # type: ignore[arg-type]
    return to_float(pixels)[:, :, :8, :8].reshape(-1, 3, 2, 4, 2, 4).movedim(4, 2).mean(1).flatten(1).double()


@pytest.fixture(scope="module")
def images() -> Tensor:
    white = torch.randn((2048, 3, SIDE, SIDE), generator=generator("gaussian images"), dtype=torch.float64)
    return to_uint8(sum((d * band for d, band in zip(DEVIATIONS, split(white, 2), strict=True)), torch.zeros(())))


@pytest.fixture(scope="module")
def audited(images: Tensor) -> Callable[..., Audit]:
    real = patches(images)
    unit = real.std()

    def run(denoiser: Denoiser = EXACT, process: Process = PROCESS, **options: object) -> Audit:
        data = ArrayImages(images.numpy())
        solver_steps = options.pop("solver_steps", 60)
        return audit(
            process,
            denoiser,
            data,
            lambda samples: frechet(patches(samples) / unit, real / unit),
            COUNT,
            {**SAMPLING, **options},
            solver_steps,  # type: ignore[arg-type]
        )

    return run


@pytest.fixture(scope="module")
def exact(audited: Callable[..., Audit]) -> Audit:
    return audited()


def by_cost(audit: Audit) -> str:
    costs = audit.attribution.costs
    return max(costs, key=costs.__getitem__)


def test_an_exact_denoiser_loses_nothing_at_any_turning_point(exact: Audit) -> None:
    found = exact.attribution
    assert list(found.costs) == ["level_2", "lift_2", "level_1", "lift_1", "level_0"]
    assert all(abs(cost) < 3 * found.error for cost in found.costs.values())
    assert found.total == pytest.approx(sum(found.costs.values()))
    assert exact.worst is None
    assert exact.verdict.startswith("no part costs score beyond the sampling error")
    for state in exact.states:
        # The solver, 60 steps of second order, shrinks a band by 2 %.
        assert np.divide(state.generated, state.true) == pytest.approx(1, abs=0.03)
        assert state.mean_difference < 1.3 * state.mean_floor
        assert state.distance < 1.2 * state.distance_floor


def test_the_empirical_distribution_loses_nothing_either() -> None:
    process = Process(Schedule.dvdp((300, 600)))
    few = to_uint8(digits(200, SIDE).expand(-1, 3, -1, -1))
    # Grey images: one colour is enough, and of a constant score there is no unit.
    real = patches(few)[:, :16]
    found = audit(
        process,
        EmpiricalDenoiser(process, to_float(few)),
        ArrayImages(few.numpy()),
        lambda samples: frechet(patches(samples)[:, :16], real),
        128,
        {"steps": 40},
        solver_steps=40,
    )
    assert found.worst is None
    assert found.solver is None
    assert all(abs(cost) < 3 * found.attribution.error for cost in found.attribution.costs.values())


@pytest.mark.parametrize(
    ("level", "denoiser"),
    [
        (0, WrongAt(0, (0.1, 0.4, 0.8))),
        (1, WrongAt(1, (0.2, 0.1, 0.8))),
        (2, WrongAt(2, DEVIATIONS, mean=0.5)),
    ],
    ids=["fine detail shrunk at level 0", "detail shrunk at level 1", "too bright at level 2"],
)
def test_a_denoiser_wrong_at_one_level_is_blamed_on_that_level(
    audited: Callable[..., Audit], exact: Audit, level: int, denoiser: Denoiser
) -> None:
    found = audited(denoiser)
    assert by_cost(found) == f"level_{level}"
    assert found.attribution.costs[f"level_{level}"] > 3 * found.attribution.error
    # The solver may cost as much beside it: noisy steps forgive what a deterministic one carries along.
    assert found.worst in (f"level_{level}", "solver")
    assert f"level {level} (t = " in found.verdict
    # States show it at the next turning point, and none before.
    for state, before in zip(found.states, exact.states, strict=True):
        if state.level > level:
            assert state == before
        elif state.level == level:
            assert state.distance > 1.2 * before.distance
    if level == 1:
        detail, coarse = np.divide(found.states[0].generated, found.states[0].true)
        assert detail < 0.8
        assert coarse == pytest.approx(1, abs=0.03)
    if level == 2:
        assert found.states[1].mean_difference > 1.5 * found.states[1].mean_floor


def test_a_wrong_lift_is_blamed_on_the_lift(audited: Callable[..., Audit]) -> None:
    found = audited(EXACT, WrongLift(PROCESS.schedule))
    assert by_cost(found) == "lift_1"
    assert "the lift at t = 100 costs most" in found.verdict


def test_too_few_steps_are_blamed_on_the_solver(audited: Callable[..., Audit]) -> None:
    found = audited(solver="ddim", steps=3, solver_steps=200)
    assert found.worst == "solver"
    assert found.solver is not None
    assert (found.solver["solver"], found.solver["steps"], found.solver["timestep_spacing"]) == ("ddpm", 200, "uniform")
    assert found.verdict.startswith("the solver costs most")


def test_without_turning_points_there_is_the_solver_alone(images: Tensor, audited: Callable[..., Audit]) -> None:
    process = Process(Schedule.ddpm())
    # All of the image is one band.
    found = audited(GaussianDenoiser(process, [0.35]), process)
    assert found.states == ()
    assert set(found.scores) == {"free", "real", "solver"}
    assert list(found.attribution.costs) == ["level_0"]
    assert Audit.from_json(found.to_json()) == found


def made(**values: float) -> dict[str, Score]:
    return {name: Score(value, (value + 1, value + 1)) for name, value in values.items()}


def test_costs_are_the_differences_between_starts() -> None:
    scores = made(free=20, before_2=18, after_2=17, before_1=9, after_1=10, real=2, solver=15)
    found = attribute(scores, 2)
    assert found.costs == {"level_2": 2, "lift_2": 1, "level_1": 8, "lift_1": -1, "level_0": 8}
    assert (found.total, found.solver, found.error) == (18, 5, 0)
    scores["free"] = Score(20, (24, 18))
    # Of six differences the first and the solver's now differ by 6 between halves.
    assert attribute(scores, 2).error == pytest.approx((2 * 3**2 / 6) ** 0.5)
    assert attribute(made(free=5, real=1), 0).costs == {"level_0": 4}
    assert attribute(made(free=5, real=1), 0).solver is None
    assert starts(2) == ["free", "before_2", "after_2", "before_1", "after_1"]


@pytest.mark.parametrize(
    ("sampling", "steps", "expected"),
    [
        ({"solver": "ddim", "steps": 20}, None, ("ddpm", 250, "uniform")),
        ({"solver": "ddim", "steps": 500, "timestep_spacing": "logsnr"}, None, ("ddpm", 500, "uniform")),
        ({"solver": "ddpm", "steps": 20, "share": (10, 10)}, 50, ("ddpm", 50, "uniform")),
        ({"solver": "ddpm", "steps": 250, "eta": 0.0, "seed": 4}, None, None),
        ({"solver": "ddpm", "steps": 20}, 20, None),
    ],
)
def test_the_solver_is_compared_with_many_ancestral_steps_unless_it_is_that(
    sampling: Mapping[str, object], steps: int | None, expected: tuple[object, ...] | None
) -> None:
    found = solver_sampling(sampling, 1000, steps)
    assert (found and (found["solver"], found["steps"], found["timestep_spacing"])) == expected
    assert found is None or found["share"] == "length"


@pytest.fixture(scope="module")
def subject(images: Tensor) -> Subject:
    return Subject(PROCESS, EXACT, ArrayImages(images.numpy()), {**SAMPLING, "steps": 6}, batch=4)


def test_true_states_are_alike_before_and_after_the_lift_and_have_the_true_variance(subject: Subject) -> None:
    for k in (1, 2):
        before, after = (true_states(subject, k, lifted, 0, 256) for lifted in (False, True))
        assert torch.allclose(bands.down(after), before, atol=1e-5)
        t = PROCESS.schedule.turning_points[k - 1]
        signal, noise = PROCESS.schedule.signal[:, t], PROCESS.schedule.noise[:, t]
        expected = (signal * torch.tensor(DEVIATIONS)).square() + noise.square()
        assert bands.energies(after, 3 - k).mean(0) == pytest.approx(expected[k - 1 :].tolist(), rel=0.03)


@pytest.mark.parametrize("start", ["free", "before_2", "after_1", "real"])
def test_what_is_drawn_does_not_depend_on_how_it_is_split(subject: Subject, start: str) -> None:
    whole, states = draw(subject, start, 0, 10)
    parts = [draw(subject, start, first, size) for first, size in ((0, 3), (3, 7))]
    assert (torch.cat([images for images, _ in parts]).int() - whole.int()).abs().max() <= 1
    assert set(states) == ({1, 2} if start == "free" else set())
    for k, kept in states.items():
        joined = torch.cat([states[k].energies for _, states in parts])
        assert joined.shape == (10, 3 - k)
        assert torch.allclose(joined, kept.energies, rtol=1e-4)


def test_a_denoiser_gets_the_classes_of_the_images_whose_states_it_goes_on_from(images: Tensor) -> None:
    seen: list[Tensor] = []

    def class_conditional(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels)
        return EXACT(x, t)

    # The label of an image is found in one of its pixels.
    few = images.numpy()[:40].copy()
    few[:, 0, 0, 0] = np.arange(40) % 3
    data = ArrayImages(few, np.arange(40) % 3)
    classes = Classes((14, 13, 13, 0))
    subject = Subject(PROCESS, class_conditional, data, {**SAMPLING, "steps": 6}, batch=4, classes=classes)
    draw(subject, "free", 0, 8)
    assert torch.equal(torch.cat(seen[:: len(seen) // 2]), classes.draw(SAMPLING["seed"], 0, 8))
    for start in ("before_2", "after_1"):
        seen.clear()
        draw(subject, start, 0, 8)
        assert torch.equal(torch.cat(seen[:: len(seen) // 2]), real_images(subject, 0, 8)[:, 0, 0, 0].long())


def test_real_images_are_drawn_each_for_itself(subject: Subject, images: Tensor) -> None:
    drawn = real_images(subject, 0, 500)
    assert torch.equal(drawn[200:], real_images(subject, 200, 300))
    assert all((images == image).flatten(1).all(1).any() for image in drawn[:20])
    other = dataclasses.replace(subject, sampling={"seed": 4})
    assert not torch.equal(drawn, real_images(other, 0, 500))


def test_states_of_every_size_are_described_by_few_numbers() -> None:
    for resolution in (2, 4, 6, 8, 15, 64):
        x = torch.randn((400, 3, resolution, resolution), generator=generator("states", resolution))
        features = describe(x, 0).features
        assert features.shape[1] <= 24 + 4
        assert features.isfinite().all()
        if resolution % 4 == 0:
            # White noise has its own variance in every average.
            assert features[:, :24].std(0).mean() == pytest.approx(1, abs=0.03)


def test_the_frechet_distance_of_known_distributions_is_right() -> None:
    x = torch.randn((20_000, 3), generator=generator("frechet"), dtype=torch.float64)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet(x, x + 2) == pytest.approx(12)
    assert frechet(x, 3 * x) == pytest.approx(4 * x.var(0).sum().item() + 4 * x.mean(0).square().sum().item())


def test_an_audit_as_text_gives_back_an_equal_one(exact: Audit) -> None:
    assert Audit.from_json(exact.to_json()) == exact
    for text in ("", "{}", "[1]", exact.to_json().replace("turning_points", "points")):
        with pytest.raises(UserError, match=r"audits/x\.json: found something else than an audit"):
            Audit.from_json(text, "audits/x.json")


def test_too_few_or_too_many_images_are_refused(audited: Callable[..., Audit], images: Tensor) -> None:
    for count in (FEWEST - 1, 2049):
        with pytest.raises(UserError, match=f"--images: found {count}, expected at least 64 .* at most 2,048"):
            audit(PROCESS, EXACT, ArrayImages(images.numpy()), lambda _: 0.0, count, SAMPLING)


def test_the_chart_shows_parts_and_states(exact: Audit, tmp_path: Path) -> None:
    with Image.open(draw_audit(exact, tmp_path / "audit.png", "exact")) as picture:
        assert picture.width > 1.5 * picture.height
        white = (np.asarray(picture.convert("RGB")) == 255).all(axis=2).mean()
    assert 0.5 < white < 0.97
    alone = dataclasses.replace(exact, turning_points=(), states=(), scores=made(free=3, real=1), solver=None)
    with Image.open(draw_audit(alone, tmp_path / "ddpm.png", "ddpm")) as picture:
        assert picture.width > picture.height
