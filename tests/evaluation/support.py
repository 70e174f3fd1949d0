"""Images in memory, and samples on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dvdp.evaluation.extractors import Extractor


@dataclass(frozen=True)
class Arrays:
    """Labelled images in memory."""

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.pixels[index], int(self.labels[index])

    def part(self, part: slice | np.ndarray) -> Arrays:
        return Arrays(self.pixels[part], self.labels[part])


@dataclass(frozen=True)
class Scoring:
    """A data set, its extractor and its reference."""

    images: Arrays
    extractor: Extractor
    reference: Path


def write_shards(folder: Path, pixels: np.ndarray, shard: int = 100) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(pixels), shard):
        np.save(folder / f"{first:08d}.npy", pixels[first : first + shard])
    return folder


def write_pngs(folder: Path, pixels: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i:05d}.png")
    return folder
