"""Downsampled ImageNet."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dvdp.data.sources.base import Item, LeftOut, Pixels
from dvdp.data.sources.npz import Array, arrays, described
from dvdp.data.sources.shards import in_order, shards
from dvdp.errors import UserError

_SIDES = (8, 16, 32, 64)


class Imagenet64:
    """ImageNet at 64 px, or 32, 16 or 8, from its batches in .npz files, in the order of their numbers.

    Classes are the numbers that it gives them. Batches that are pickled are refused.

    Raises:
        UserError: the path is missing, a batch is, or is damaged, pickled, or holds other arrays.
    """

    needs: str | None = "the folder of its train_data_batch_1.npz to train_data_batch_10.npz, or one such file"

    def __init__(self, path: Path | None) -> None:
        assert path is not None, "checked by DatasetParams"
        self.left_out = LeftOut()
        pickled = [p for p in (path, *path.glob("train_data_batch_*")) if p.is_file() and _is_pickle(p)]
        if pickled:
            raise UserError(
                f"dataset.path: '{pickled[0]}' is pickled, which can run code when it is read; download the batches as"
                " .npz files from the same place."
            )
        files = shards(path, "train_data_batch_*.npz", str(self.needs), self.left_out)
        numbers = [file.stem.rpartition("_")[2] for file in files]
        if path.is_dir() and numbers != [str(i + 1) for i in range(len(files))]:
            raise UserError(
                f"dataset.path: found batches {', '.join(numbers)} in '{path}', expected all from 1 on; download the"
                " others too."
            )
        self._batches = [_batch(file) for file in files]
        self.count = sum(len(labels) for _, labels in self._batches)
        self.labels = in_order(label for _, labels in self._batches for label in labels)

    def __iter__(self) -> Iterator[Item]:
        for images, labels in self._batches:
            for i, (image, label) in enumerate(zip(images.rows(), labels, strict=True)):
                yield Item(f"{images.path.name}/{i:06d}", label, partial(np.array, image), _planes)


def _planes(row: Any) -> Pixels:
    """Red, green and blue, one after the other."""
    side = round((row.size / 3) ** 0.5)
    return np.ascontiguousarray(row.reshape(3, side, side).transpose(1, 2, 0))


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"\x80"


def _batch(file: Path) -> tuple[Array, list[str]]:
    found = arrays(file)
    images, labels = found.get("data"), found.get("labels")
    sizes = [3 * side**2 for side in _SIDES]
    if not images or not labels or not images.is_of_bytes or len(images.shape) != 2 or images.shape[1] not in sizes:
        raise UserError(
            f"dataset.path: found {described(found)} in '{file}', expected data of uint8 (n, 12288), or (n, 3072),"
            " (n, 768) or (n, 192), and labels."
        )
    return images, labels.classes(images.shape[0])
