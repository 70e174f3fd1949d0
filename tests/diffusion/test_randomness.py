"""Noise as a function of what it is for, and what follows for samples."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dvdp import Process, Schedule, sample
from dvdp.diffusion.randomness import ImageNoise, derive_seed, generator
from dvdp.diffusion.sampling import Progress
from dvdp.diffusion.timesteps import step_grid

PROCESS = Process(Schedule.dvdp([300, 600]))
SHAPE = (5, 3, 16, 16)

SOLVERS: dict[str, dict[str, Any]] = {
    "ddpm": {"solver": "ddpm"},
    "ddim": {"solver": "ddim"},
    "ddim, eta": {"solver": "ddim", "eta": 0.7},
}


def elementwise(x: Tensor, t: Tensor) -> Tensor:
    return 0.7 * x.clamp(-2, 2)


def convolution(x: Tensor, t: Tensor) -> Tensor:
    kernel = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(0)) / 27**0.5
    return torch.nn.functional.conv2d(x, kernel, padding=1)


def in_parts(denoiser: Any, sizes: list[int], first: int, **how: Any) -> Tensor:
    """SHAPE's images drawn in batches of these sizes."""
    parts = []
    for size in sizes:
        parts.append(sample(PROCESS, denoiser, (size, *SHAPE[1:]), 20, first=first, **how))
        first += size
    return torch.cat(parts)


def test_seeds_tell_purposes_apart_and_stay_the_same_for_ever() -> None:
    assert derive_seed(0, "image", 7) == derive_seed(0, "image", 7)
    assert 0 <= derive_seed("x") < 2**63
    purposes = [(s, w, i) for s in range(20) for w in ("image", "levels") for i in range(20)]
    assert len({derive_seed(*purpose) for purpose in purposes}) == len(purposes)
    # Changing this number changes every image and every run.
    assert derive_seed(0, "image", 0) == 801287590894671215
    assert torch.equal(torch.randn(4, generator=generator(1, "a")), torch.randn(4, generator=generator(1, "a")))


def test_image_noise_is_normal_and_goes_on_from_draw_to_draw() -> None:
    source = ImageNoise(0, 0, 50)
    draws = torch.stack([source.normal((3, 16, 16), torch.float64) for _ in range(4)])
    n = draws.numel()
    assert draws.mean().item() == pytest.approx(0, abs=5 / n**0.5)
    assert draws.var().item() == pytest.approx(1, abs=5 * (2 / n) ** 0.5)
    # Neither images nor draws repeat.
    between = torch.corrcoef(draws.flatten(2).flatten(0, 1)) - torch.eye(200)
    assert between.abs().max() < 6 / 768**0.5


def test_noise_is_the_same_in_any_batch_and_does_not_repeat() -> None:
    shapes = [(3, 8, 8)] * 7 + [(3, 16, 16)] * 3 + [(3, 8, 8)] * 2 + [(3, 3, 5)]

    def draws(first: int, count: int) -> list[Tensor]:
        source = ImageNoise(0, first, count)
        return [source.normal(shape) for shape in shapes]

    whole = draws(0, 5)
    assert [part.shape for part in whole] == [(5, *shape) for shape in shapes]
    for first, count in ((3, 2), (4, 1), (0, 3), (2, 0)):
        for part, ours in zip(draws(first, count), whole, strict=True):
            assert torch.equal(part, ours[first : first + count])
    small = torch.cat([part for part in whole if part.shape[-1] == 8]).flatten(1)
    assert (torch.corrcoef(small) - torch.eye(len(small))).abs().max() < 6 / 192**0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_images_do_not_depend_on_the_batch_on_a_gpu() -> None:
    whole = sample(PROCESS, elementwise, SHAPE, 20, device="cuda")
    parts = [sample(PROCESS, elementwise, (n, *SHAPE[1:]), 20, first=f, device="cuda") for f, n in ((0, 2), (2, 3))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
@pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1], [2, 3], [4, 1]], ids=str)
@pytest.mark.parametrize("first", [0, 1000])
def test_images_do_not_depend_on_the_batch(sizes: list[int], first: int, solver: dict[str, Any]) -> None:
    whole = sample(PROCESS, elementwise, SHAPE, 20, first=first, **solver)
    assert torch.equal(in_parts(elementwise, sizes, first, **solver), whole)
    whole = sample(PROCESS, convolution, SHAPE, 20, first=first, **solver)
    torch.testing.assert_close(in_parts(convolution, sizes, first, **solver), whole, rtol=0, atol=1 / 255)
    at_once = sample(PROCESS, convolution, SHAPE, 20, first=first, batch=sizes[0], **solver)
    torch.testing.assert_close(at_once, whole, rtol=0, atol=1 / 255)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 100])
def test_a_coarse_level_has_as_many_pixels_at_once_as_level_0(batch: int, solver: dict[str, Any]) -> None:
    shape, calls = (23, 3, 16, 16), []

    def spy(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        assert len(x) == len(t) == len(labels)
        calls.append((x.shape[-1], labels.tolist()))
        return elementwise(x, t) + 0.01 * labels[:, None, None, None]

    labels = torch.arange(23)
    how: dict[str, Any] = {"steps": 20, "first": 4, "labels": labels, **solver}
    whole = sample(PROCESS, spy, shape, **how)
    calls.clear()
    seen: list[Progress] = []
    assert torch.equal(sample(PROCESS, spy, shape, batch=batch, callback=seen.append, **how), whole)
    expected, nfe = [], 0
    for level, times in step_grid(PROCESS.schedule, 20):
        parts = [part.tolist() for part in labels.split(batch * 4**level)]
        expected += [(16 >> level, part, nfe + i) for part in parts for i in range(1, len(times))]
        nfe += len(times) - 1
    assert calls == [(side, part) for side, part, _ in expected]
    assert [(p.state.shape[-1], len(p.state), p.nfe) for p in seen] == [(s, len(part), n) for s, part, n in expected]
    assert {p.total_nfe for p in seen} == {20}
    start = (torch.randn(23, 3, 8, 8, generator=torch.Generator().manual_seed(0)), 300)
    whole = sample(PROCESS, spy, shape, start=start, **how)
    assert torch.equal(sample(PROCESS, spy, shape, start=start, batch=batch, **how), whole)


def test_seed_and_first_name_the_images() -> None:
    images = sample(PROCESS, elementwise, SHAPE, 20, seed=1)
    assert torch.equal(sample(PROCESS, elementwise, SHAPE, 20, seed=1), images)
    assert torch.equal(sample(PROCESS, elementwise, (2, *SHAPE[1:]), 20, seed=1, first=3), images[3:])
    assert not torch.allclose(sample(PROCESS, elementwise, SHAPE, 20, seed=2), images, atol=0.1)


def test_sampling_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    sample(PROCESS, elementwise, SHAPE, 20)
    assert torch.equal(torch.randn(3), expected)


def test_number_type_of_states_and_images_is_the_one_asked_for() -> None:
    seen = set()

    def spy(x: Tensor, t: Tensor) -> Tensor:
        seen.add((x.dtype, t.dtype))
        return elementwise(x, t).to(torch.bfloat16)

    assert sample(PROCESS, spy, SHAPE, 20).dtype == torch.float32
    assert sample(PROCESS, spy, SHAPE, 20, dtype=torch.float64).dtype == torch.float64
    assert seen == {(torch.float32, torch.int64), (torch.float64, torch.int64)}


class CountingNoise(ImageNoise):
    """Notes the resolution of every draw."""

    drawn: list[int]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        CountingNoise.drawn = []

    def normal(self, shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        CountingNoise.drawn.append(shape[-1])
        return super().normal(shape, dtype)


@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        # The start, a lift to 8 px, a lift to 16 px.
        ({"solver": "ddim"}, [4, 8, 16]),
        # And each step, but for the last.
        ({"solver": "ddim", "eta": 0.3}, [4] * 4 + [8] * 4 + [16] * 3),
        ({"solver": "ddpm"}, [4] * 4 + [8] * 4 + [16] * 3),
        ({"solver": "ddpm", "variance": "fixed_large"}, [4] * 4 + [8] * 4 + [16] * 3),
    ],
    ids=["ddim", "eta", "ddpm", "fixed_large"],
)
def test_only_stochastic_steps_draw_noise(
    solver: dict[str, Any], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dvdp.diffusion.sampling.ImageNoise", CountingNoise)
    process = Process(Schedule.dvdp([333, 666]))
    sample(process, elementwise, SHAPE, 9, **solver)
    assert CountingNoise.drawn == expected


def test_callback_sees_every_function_evaluation_at_its_level() -> None:
    seen: list[Progress] = []
    calls: list[tuple[int, int]] = []

    def spy(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (5,)
        assert len(t.unique()) == 1
        calls.append((int(t[0]), x.shape[-1]))
        return elementwise(x, t)

    images = sample(PROCESS, spy, SHAPE, 25, callback=seen.append)
    grid = [(level, t, s) for level, times in step_grid(PROCESS.schedule, 25) for t, s in pairwise(times)]
    assert [(p.level, p.t, p.s) for p in seen] == grid
    assert [(p.nfe, p.total_nfe) for p in seen] == [(i + 1, 25) for i in range(25)]
    assert calls == [(t, 16 >> level) for level, t, _ in grid]
    for p in seen:
        assert p.state.shape == p.clean.shape == (5, 3, 16 >> p.level, 16 >> p.level)
    assert torch.equal(seen[-1].state, images)
    assert torch.equal(seen[-1].clean, images)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_clipping_keeps_clean_images_in_the_pixel_range_of_their_level(solver: dict[str, Any]) -> None:
    def wild(x: Tensor, t: Tensor) -> Tensor:
        return -10 * x

    clipped: list[Progress] = []
    images = sample(PROCESS, wild, SHAPE, 20, callback=clipped.append, **solver)
    assert all(p.clean.abs().max() == 2.0**p.level for p in clipped)
    assert images.abs().max() <= 1
    free: list[Progress] = []
    sample(PROCESS, wild, SHAPE, 20, clip=False, callback=free.append, **solver)
    assert all(p.clean.abs().max() > 2.0**p.level for p in free)
