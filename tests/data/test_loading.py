"""The training stream is a function of (seed, step)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dvdp.data.loading import ArrayImages, Batch, training_batches
from dvdp.data.records import Form, encode
from dvdp.data.store import ImageStore
from dvdp.data.writer import StoreWriter
from dvdp.errors import UserError
from dvdp.models.pixels import to_float, to_uint8


def numbered(count: int) -> ArrayImages:
    """Image i holds the number i in its left half and the number i + 1000 in its right half, both in base 256.

    Its label is i % 10.
    """
    numbers = np.stack([np.arange(count), np.arange(count) + 1000], axis=1)
    pixels = np.stack([numbers % 256, numbers // 256, numbers * 0], axis=1).astype(np.uint8)
    return ArrayImages(pixels[:, :, None, :].repeat(4, axis=2).repeat(2, axis=3), np.arange(count) % 10)


def left(batch: Batch) -> list[int]:
    """The numbers at the left: i, or i + 1000 if mirrored."""
    corner = batch.images[:, :2, 0, 0].int()
    return (corner[:, 0] + 256 * corner[:, 1]).tolist()


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def indices(stream: Iterator[Batch], steps: int) -> list[int]:
    return [number % 1000 for batch in islice(stream, steps) for number in left(batch)]


@pytest.mark.parametrize("flip", [False, True])
def test_batches_are_uint8_images_with_their_labels(flip: bool) -> None:
    batch = next(training_batches(numbered(30), batch=6, seed=0, flip=flip))
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (6, 3, 4, 4)
    assert batch.labels.tolist() == [number % 10 for number in left(batch)]


@pytest.mark.parametrize(("count", "batch"), [(60, 12), (50, 12), (7, 20)])
def test_every_epoch_shows_every_image_once_in_an_order_of_its_own(count: int, batch: int) -> None:
    seen = indices(training_batches(numbered(count), batch=batch, seed=0), 5 * count // batch + 1)
    epochs = [seen[i : i + count] for i in range(0, 3 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert seen != indices(training_batches(numbered(count), batch=batch, seed=1), 5 * count // batch + 1)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("flip", [False, True])
def test_ranks_share_the_batches_of_a_single_one(world_size: int, flip: bool) -> None:
    options: dict[str, Any] = {"batch": 12, "seed": 3, "flip": flip, "world_size": world_size}
    whole = training_batches(numbered(50), **{**options, "world_size": 1})
    ranks = [training_batches(numbered(50), rank=rank, **options) for rank in range(world_size)]
    for _ in range(9):
        expected = next(whole)
        for rank, stream in enumerate(ranks):
            assert same(next(stream), Batch(*(part[rank::world_size] for part in expected)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 1, 4, 23])
def test_a_resumed_stream_goes_on_as_an_uninterrupted_one(start: int, workers: int) -> None:
    options: dict[str, Any] = {"batch": 8, "seed": 5, "flip": True, "rank": 1, "world_size": 2}
    expected = list(islice(training_batches(numbered(30), **options), start + 5))[start:]
    resumed = training_batches(numbered(30), start_step=start, workers=workers, **options)
    assert all(same(a, b) for a, b in zip(islice(resumed, 5), expected, strict=True))


def test_a_store_gives_the_stream_of_its_images_to_any_workers(tmp_path: Path) -> None:
    images = numbered(30)
    form = Form(4)
    with StoreWriter(
        tmp_path / "store", name="numbers", source="image_folder", form=form, labels=list("abcdefghij")
    ) as writer:
        writer.add(encode([images[i][0] for i in range(30)], [i % 10 for i in range(30)], form))
        writer.finish()
    store = ImageStore(tmp_path / "store")
    expected = list(islice(training_batches(images, batch=8, seed=1), 8))
    for workers in (0, 1, 2):
        found = islice(training_batches(store, batch=8, seed=1, workers=workers), 8)
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_half_of_the_images_are_mirrored_and_another_half_in_the_next_epoch() -> None:
    count = 400
    stream = training_batches(numbered(count), batch=count, seed=0, flip=True)
    flips = []
    for batch in islice(stream, 2):
        numbers = np.array(left(batch))
        flips.append((numbers >= 1000)[np.argsort(numbers % 1000)])
        rows = batch.images[:, 0, 0]
        assert (rows[:, 0] == rows[:, 1]).all()
        assert (rows[:, 2] == rows[:, 3]).all()
    assert all(0.42 < flip.mean() < 0.58 for flip in flips)
    assert 0.42 < (flips[0] == flips[1]).mean() < 0.58


@pytest.mark.parametrize("workers", [0, 1])
def test_the_random_state_of_training_is_left_alone(workers: int) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(training_batches(numbered(30), batch=8, seed=1, workers=workers))
    assert torch.equal(torch.rand(3), expected)


def test_mistakes_are_named_before_the_first_batch() -> None:
    with pytest.raises(UserError, match=r"training\.batch: found 10, expected a multiple of the 4 ranks"):
        training_batches(numbered(30), batch=10, seed=0, world_size=4)
    with pytest.raises(UserError, match="no images"):
        training_batches(ArrayImages(np.zeros((0, 3, 4, 4), np.uint8)), batch=4, seed=0)
    with pytest.raises(UserError, match=r"expected uint8 \(n, 3, side, side\)"):
        ArrayImages(np.zeros((5, 4, 4, 3), np.uint8))
    with pytest.raises(UserError, match="labels"):
        ArrayImages(np.zeros((5, 3, 4, 4), np.uint8), np.zeros(4, np.int64))


def test_an_array_has_labels_or_none() -> None:
    pixels = np.zeros((2, 3, 4, 4), np.uint8)
    assert ArrayImages(pixels)[1][1] == -1
    assert ArrayImages(pixels, np.array([3, 7]))[1][1] == 7


def test_floats_are_between_minus_one_and_one_and_go_back_exactly() -> None:
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    floats = to_float(values)
    assert floats.dtype == torch.float32
    assert (floats.min(), floats.max()) == (-1, 1)
    assert torch.equal(to_uint8(floats), values)


def test_training_on_an_array_needs_torch_alone() -> None:
    code = (
        "import sys; sys.modules.update({m: None for m in ('lmdb', 'albumentations', 'cv2', 'sklearn')});"
        "import dvdp.data.prepare, dvdp.data.sources, dvdp.data.store;"
        "import numpy as np; from dvdp.data.loading import ArrayImages, training_batches;"
        "images = ArrayImages(np.zeros((5, 3, 4, 4), np.uint8));"
        "print(tuple(next(training_batches(images, batch=4, seed=0)).images.shape))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "(4, 3, 4, 4)"
