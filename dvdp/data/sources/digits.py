"""The embedded data set."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from dvdp.data.sources.base import Item, LeftOut


class Digits:
    """scikit-learn's 1797 handwritten digits, 8 px, white on black."""

    needs: str | None = None
    left_out = LeftOut()

    def __init__(self, path: Path | None) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        self._images = np.round(data.images * (255 / 16)).astype(np.uint8)
        self._targets = [str(target) for target in data.target]
        self.count = len(self._images)
        self.labels = tuple(sorted(set(self._targets)))

    def __iter__(self) -> Iterator[Item]:
        for i, (image, target) in enumerate(zip(self._images, self._targets, strict=True)):
            yield Item(f"{i:05d}", target, partial(np.repeat, image[:, :, None], 3, axis=2))
