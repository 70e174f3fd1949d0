"""Classifier-free guidance with exact denoisers of two laws: what is mixed, at which levels, at what cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dvdp import Process, Schedule, UserError, sample
from dvdp.diffusion.guidance import threshold
from dvdp.diffusion.sampling import Progress
from dvdp.diffusion.solvers import SOLVERS
from tests.diffusion.exact import GaussianDenoiser

PROCESS = Process(Schedule.dvdp([300, 600]))
STD = (0.144, 0.374, 0.879)
SHAPE = (6, 3, 8, 8)
LABELS = torch.tensor([0, 1, 0, -1, 1, 1])
#: Of class 0, class 1, and images without a label, which comes last.
MEANS = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Conditional:
    """Exact for classes of the same std and means of their own; notes how many images it is called with at each t."""

    def __init__(self, std: tuple[tuple[float, ...], ...] = (STD, STD, STD)) -> None:
        self.laws = [GaussianDenoiser(PROCESS, each, mean[None]) for each, mean in zip(std, MEANS, strict=True)]
        self.calls: list[tuple[int, int]] = []

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.calls.append((PROCESS.level(t), len(x)))
        every = torch.stack([law(x, t) for law in self.laws])
        return every[labels, torch.arange(len(x))]


def drawn(denoiser: Any, **options: Any) -> Tensor:
    how = {"clip": False, "labels": LABELS, **options}
    return sample(PROCESS, denoiser, SHAPE, 12, dtype=torch.float64, **how)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_guidance_between_laws_of_one_std_draws_from_the_law_of_the_mixed_mean(solver: str, scale: float) -> None:
    guided = drawn(Conditional(), solver=solver, guidance_scale=scale)
    for label in (0, 1, -1):
        mean = (1 - scale) * MEANS[-1] + scale * MEANS[label]
        exact = drawn(GaussianDenoiser(PROCESS, STD, mean[None]), solver=solver, labels=None)
        torch.testing.assert_close(guided[label == LABELS], exact[label == LABELS], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_the_prediction_is_the_mix_of_both_at_every_step_and_is_clipped_after_it(solver: str, clip: bool) -> None:
    """Of laws of other std, whose mix is the law of nothing."""
    both, w = Conditional((STD, (0.3, 0.2, 0.5), (0.1, 0.5, 0.9))), 4.0

    def mixed(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return (1 - w) * both(x, t, torch.full_like(labels, -1)) + w * both(x, t, labels)

    guided, by_hand = drawn(both, solver=solver, guidance_scale=w, clip=clip), drawn(mixed, solver=solver, clip=clip)
    torch.testing.assert_close(guided, by_hand, rtol=1e-9, atol=1e-9)
    assert (guided.abs().max() <= 1 + 1e-9) == clip


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_a_scale_of_one_is_bit_for_bit_no_guidance_and_zero_the_unconditional_model(solver: str) -> None:
    none = torch.full_like(LABELS, -1)
    plain, one, zero = Conditional(), Conditional(), Conditional()
    assert torch.equal(drawn(one, solver=solver, guidance_scale=1.0), drawn(plain, solver=solver))
    assert torch.equal(drawn(zero, solver=solver, guidance_scale=0.0), drawn(plain, solver=solver, labels=none))
    assert one.calls == zero.calls == plain.calls[: len(one.calls)], "neither computes the half that it does not need"


def test_a_list_guides_its_levels_alone_in_one_doubled_batch() -> None:
    coarse, plain = Conditional(), Conditional()
    states: dict[str, list[Progress]] = {"coarse": [], "plain": []}
    drawn(coarse, guidance_scale=[1.0, 1.0, 3.0], callback=states["coarse"].append)
    drawn(plain, callback=states["plain"].append)
    assert {size for level, size in coarse.calls if level == 2} == {12}
    assert {size for level, size in coarse.calls if level < 2} == {6}
    assert len(coarse.calls) == len(plain.calls) == 12, "one call a step"
    drawn(fine := Conditional(), guidance_scale=[3.0, 1.0, 1.0], callback=states.setdefault("fine", []).append)
    for one, other in zip(states["fine"], states["plain"], strict=True):
        assert torch.equal(one.clean, other.clean) == (one.level > 0), (one.level, one.t)
    assert {size for level, size in fine.calls if level} == {6}


def test_guided_images_do_not_depend_on_the_batch() -> None:
    whole = drawn(Conditional(), guidance_scale=[3.0, 2.0, 4.0], guidance_rescale=0.5)
    parts = drawn(Conditional(), guidance_scale=[3.0, 2.0, 4.0], guidance_rescale=0.5, batch=1)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("phi", [0.4, 1.0])
def test_rescale_takes_the_std_of_an_image_to_that_of_the_conditional_prediction(phi: float) -> None:
    none, w = torch.full_like(LABELS, -1), 5.0

    def first(**options: Any) -> Tensor:
        """The first prediction, which all make of the same noise."""
        seen: list[Progress] = []
        drawn(Conditional(), callback=seen.append, **options)
        return seen[0].clean

    conditional, without = first(), first(labels=none)
    plain = (1 - w) * without + w * conditional
    ratio = (conditional.flatten(1).std(1) / plain.flatten(1).std(1))[:, None, None, None]
    found = first(guidance_scale=w, guidance_rescale=phi)
    torch.testing.assert_close(found, phi * ratio * plain + (1 - phi) * plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("limit", [1.0, 4.0])
def test_dynamic_thresholding_scales_the_quantile_of_each_image_into_the_range(limit: float) -> None:
    x = (
        limit
        * torch.linspace(-3, 3, 48, dtype=torch.float64).reshape(1, 3, 4, 4)
        * torch.tensor([1.0, 0.2]).reshape(2, 1, 1, 1)
    )
    found = threshold(x, 0.9, limit)
    extent = x[0].abs().flatten().sort().values.quantile(0.9)
    torch.testing.assert_close(found[0], x[0].clamp(-extent, extent) / extent * limit)
    assert found[0].abs().max() == limit
    assert torch.equal(found[1], x[1]), "what is within the range stays"


def test_thresholding_keeps_samples_in_range_with_less_at_its_ends_than_clipping() -> None:
    clipped = drawn(Conditional(), guidance_scale=8.0, clip=True)
    thresholded = drawn(Conditional(), guidance_scale=8.0, clip=True, thresholding=0.95)
    for images in (clipped, thresholded):
        assert images.abs().max() <= 1 + 1e-12
    assert (thresholded.abs() > 0.999).sum() < 0.5 * (clipped.abs() > 0.999).sum()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"guidance_scale": [1.0, 3.0]},
            r"^guidance_scale: found \[1.0, 3.0\], expected a number of at least 0, or one",
        ),
        (
            {"guidance_scale": -1.0},
            r"^guidance_scale: found -1.0, expected a number of at least 0, or one for each of 3",
        ),
        ({"guidance_scale": float("nan")}, "^guidance_scale: found nan, expected"),
        ({"guidance_scale": 2.0, "labels": None}, "^guidance_scale: found 2.0 and no labels, expected labels of a cl"),
        ({"guidance_rescale": 1.5}, "^guidance_rescale: found 1.5, expected a number from 0 to 1.$"),
        ({"thresholding": -0.5}, "^thresholding: found -0.5, expected a number from 0 to 1.$"),
    ],
)
def test_what_does_not_fit_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        drawn(Conditional(), **options)
