"""Which levels a step trains."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dvdp import Schedule
from dvdp.training.levels import BLOCK, draw, drop_labels, level_counts, parts


def level_of_step(schedule: Schedule, seed: int, step: int) -> int:
    counts = level_counts(schedule, "one", seed, step, 8)
    assert sorted(counts) == [0] * (len(counts) - 1) + [8]
    return counts.index(8)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.sets(st.integers(1, 999), max_size=4), st.integers(0, 5), st.integers(0, 10_000), st.integers(1, 40))
def test_every_level_gets_its_share_of_a_batch_rounded_up_or_down(
    points: set[int], seed: int, step: int, images: int
) -> None:
    schedule = Schedule.dvdp(sorted(points))
    counts = level_counts(schedule, "all", seed, step, images)
    assert sum(counts) == images
    for count, share in zip(counts, schedule.shares(), strict=True):
        assert abs(count - share * images) < 1 + 1e-9
    assert counts == level_counts(Schedule.dvdp(sorted(points)), "all", seed, step, images), "of seed and step alone"


@pytest.mark.parametrize("images", [1, 7, 32])
def test_shares_of_batches_are_right_on_average(images: int) -> None:
    schedule = Schedule.dvdp([15, 333, 601])
    steps = 4000
    total = torch.tensor([level_counts(schedule, "all", 0, step, images) for step in range(steps)]).sum(0)
    assert (total / (steps * images)).tolist() == pytest.approx(schedule.shares(), abs=0.02 / images**0.5)


@pytest.mark.parametrize("points", [[], [600], [300, 600], [250, 500, 750]])
@pytest.mark.parametrize("block", [0, 1, 7])
def test_every_aligned_block_of_one_level_steps_holds_exact_shares(points: list[int], block: int) -> None:
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
def test_the_one_level_of_a_step_is_a_function_of_seed_and_step(step: int, seed: int, point: int) -> None:
    assert level_of_step(Schedule.dvdp([point]), seed, step) == level_of_step(Schedule.dvdp([point]), seed, step)


def test_the_order_within_a_block_differs_between_blocks_and_seeds() -> None:
    schedule = Schedule.dvdp([300, 600])
    orders = {
        tuple(level_of_step(schedule, seed, block * BLOCK + i) for i in range(BLOCK))
        for seed in (0, 1)
        for block in (0, 1)
    }
    assert len(orders) == 4


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=4).filter(any), st.integers(1, 12))
def test_no_part_of_a_step_has_too_many_pixels_and_none_could_be_spared(counts: list[int], most: int) -> None:
    images, found = sum(counts), parts(counts, most)
    assert [i for _, places in found for i in range(images)[places]] == list(range(images)), "each image once, in order"
    for level, count in enumerate(counts):
        sizes = [places.stop - places.start for at, places in found if at == level]
        assert sum(sizes) == count
        assert all(0 < size <= most * 4**level for size in sizes)
        assert (len(sizes) - 1) * most * 4**level < count or not sizes


def test_levels_of_fewer_pixels_are_cut_into_fewer_parts() -> None:
    assert [len(parts(counts, 20)) for counts in ([320], [0, 320], [0, 0, 320], [96, 96, 128])] == [16, 4, 1, 5 + 2 + 1]


def test_timesteps_of_a_level_are_one_from_each_of_equal_strata_and_noise_has_the_resolution_of_its_level() -> None:
    schedule, seen = Schedule.dvdp([300, 600]), []
    for step in range(200):
        drawn = draw(schedule, [0, 4, 2], 16, torch.device("cpu"), seed=0, step=step)
        assert [tuple(noise.shape) for noise in drawn.noise] == [(0, 3, 16, 16), (4, 3, 8, 8), (2, 3, 4, 4)]
        assert 600 < drawn.t[4:].min() <= 800 < drawn.t[5:].min() <= 1000
        seen.append(drawn.t[:4])
    t = torch.stack(seen)  # (200, 4), of 301 .. 600
    assert [(part.min(), part.max()) for part in t.T] == [(301 + 75 * i, 375 + 75 * i) for i in range(4)]
    assert t.float().mean().item() == pytest.approx(450.5, abs=5)
    torch.testing.assert_close(t[:, 1:] - t[:, :-1], torch.full((200, 3), 75))


@pytest.mark.parametrize("most", [1, 3, 100])
def test_what_is_drawn_for_an_image_does_not_depend_on_the_parts_of_its_step(most: int) -> None:
    counts = [5, 0, 17]
    drawn = draw(Schedule.dvdp([300, 600]), counts, 16, torch.device("cpu"), seed=0, step=0)
    cut = [(level, *drawn.of(level, places)) for level, places in parts(counts, most)]
    assert torch.equal(torch.cat([t for _, t, _ in cut]), drawn.t)
    for level in range(3):
        noise = [part for at, _, part in cut if at == level]
        assert torch.equal(torch.cat([drawn.noise[level][:0], *noise]), drawn.noise[level])


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_share_what_one_of_them_would_draw(world_size: int) -> None:
    schedule, counts = Schedule.dvdp([300, 600]), [6, 0, 12]
    how = {"seed": 4, "step": 2, "groups": 6}
    whole = draw(schedule, counts, 16, torch.device("cpu"), **how)
    for rank in range(world_size):
        share = [count // world_size for count in counts]
        drawn = draw(schedule, share, 16, torch.device("cpu"), rank=rank, world_size=world_size, **how)
        assert torch.equal(drawn.t, whole.t[rank::world_size])
        assert all(
            torch.equal(part, all_[rank::world_size]) for part, all_ in zip(drawn.noise, whole.noise, strict=True)
        )
    assert len(whole.noise[2].unique()) == whole.noise[2].numel(), "no two images have the same noise"
    other = draw(schedule, counts, 16, torch.device("cpu"), **{**how, "step": 3})
    assert not torch.equal(other.noise[0], whole.noise[0])


def test_labels_are_dropped_in_their_share_and_each_step_drops_others() -> None:
    labels = torch.arange(4000) % 10
    dropped = [drop_labels(labels, [1000, 0, 3000], 0.2, seed=0, step=step) for step in range(5)]
    for found in dropped:
        gone = found == -1
        assert torch.equal(found[~gone], labels[~gone])
        assert gone.double().mean().item() == pytest.approx(0.2, abs=4 * (0.16 / 4000) ** 0.5)
    assert not torch.equal(dropped[0], dropped[1])
    assert torch.equal(drop_labels(labels, [1000, 0, 3000], 0.2, seed=0, step=3), dropped[3])


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_labels_that_are_dropped_do_not_depend_on_the_ranks(world_size: int) -> None:
    labels = torch.arange(32)
    whole = drop_labels(labels, [8, 24], 0.5, seed=0, step=3, groups=4)
    for rank in range(world_size):
        own = torch.cat([part[rank::world_size] for part in (labels[:8], labels[8:])])
        found = drop_labels(
            own, [8 // world_size, 24 // world_size], 0.5, seed=0, step=3, rank=rank, world_size=world_size, groups=4
        )
        assert torch.equal(found, torch.cat([part[rank::world_size] for part in (whole[:8], whole[8:])]))
    assert 4 < (whole == -1).sum() < 28
