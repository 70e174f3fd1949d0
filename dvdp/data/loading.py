"""The training stream: which images a step sees, as a function of (seed, step) alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dvdp.diffusion.randomness import derive_seed, generator
from dvdp.errors import UserError


class Images(Protocol):
    """What can be trained on: :class:`dvdp.data.store.ImageStore`, or :class:`ArrayImages`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[NDArray[np.uint8], int]:
        """Image (3, side, side) and its label, -1 for none."""
        ...


class ArrayImages:
    """Images in memory, for machines and benchmarks without LMDB.

    Args:
        images: uint8 (n, 3, side, side).
        labels: (n,) whole numbers, or None.

    Raises:
        UserError: shape or type is another.
    """

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.integer] | None = None) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UserError(
                f"images: found {images.dtype} {images.shape}, expected uint8 (n, 3, side, side); convert them first."
            )
        if labels is not None and labels.shape != images.shape[:1]:
            raise UserError(f"labels: found shape {labels.shape}, expected ({len(images)},), one for each image.")
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return self._images[index], -1 if self._labels is None else int(self._labels[index])


class Batch(NamedTuple):
    """What a step of one rank sees."""

    images: Tensor
    """uint8 (b, 3, side, side)."""
    labels: Tensor
    """(b,) whole numbers, -1 for none."""


def training_batches(
    images: Images,
    *,
    batch: int,
    seed: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    flip: bool = False,
    workers: int = 0,
) -> Iterator[Batch]:
    """The infinite stream of training batches of one rank.

    Step n takes images [n * batch, (n+1) * batch) of an infinite sequence of epochs, and this rank every
    ``world_size``-th of them. An epoch is a permutation drawn from (seed, epoch), and image i of it is mirrored or
    not by (seed, epoch, i). So a stream begun at any step goes on exactly as an uninterrupted one, with any number of
    workers.

    Args:
        batch: images a step, over all ranks.
        start_step: number of the first step to yield.
        flip: mirror images at random; needs albumentations.
        workers: processes that read ahead; 0 reads in this one.

    Returns:
        An iterator over batches of batch / world_size images.

    Raises:
        UserError: there are no images, or the batch does not divide over the ranks.
    """
    if len(images) == 0:
        raise UserError("dataset: found no images, expected at least one; prepare the data set again.")
    if batch < 1 or batch % world_size:
        raise UserError(
            f"training.batch: found {batch}, expected a multiple of the {world_size} ranks;"
            " change it or cluster.num_workers."
        )
    loader: DataLoader[tuple[NDArray[np.uint8], int]] = DataLoader(
        _EpochImages(images, seed, flip),
        batch_sampler=_Steps(len(images), batch, seed, start_step, rank, world_size),
        collate_fn=_stack,
        num_workers=workers,
        # Of its own: a loader draws a seed at its start, which must not come out of the random state of training.
        generator=torch.Generator(),
    )
    return iter(loader)


class _Steps:
    """The (epoch, index) pairs of each step, for ever."""

    def __init__(self, count: int, batch: int, seed: int, start_step: int, rank: int, world_size: int) -> None:
        self.count, self.batch, self.seed = count, batch, seed
        self.start_step, self.rank, self.world_size = start_step, rank, world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        position, current, order = self.start_step * self.batch, -1, torch.empty(0)
        while True:
            pairs = []
            for place in range(position + self.rank, position + self.batch, self.world_size):
                epoch, offset = divmod(place, self.count)
                if epoch != current:
                    current = epoch
                    order = torch.randperm(self.count, generator=generator(self.seed, "epoch", epoch))
                pairs.append((epoch, int(order[offset])))
            yield pairs
            position += self.batch


class _EpochImages(Dataset[tuple[NDArray[np.uint8], int]]):
    """Images by (epoch, index), mirrored or not, with their labels."""

    def __init__(self, images: Images, seed: int, flip: bool) -> None:
        self.images, self.seed = images, seed
        self.transform = None
        if flip:
            from dvdp.data.transforms import train_transform

            self.transform = train_transform()

    def __getitem__(self, key: tuple[int, int]) -> tuple[NDArray[np.uint8], int]:
        epoch, index = key
        image, label = self.images[index]
        if self.transform is None:
            return image, label
        return self.transform(image, derive_seed(self.seed, "flip", epoch, index)), label


def _stack(entries: list[tuple[NDArray[np.uint8], int]]) -> Batch:
    images, labels = zip(*entries, strict=True)
    return Batch(torch.from_numpy(np.stack(images)), torch.tensor(labels))
