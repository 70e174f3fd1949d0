"""CelebA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dvdp.data.sources.base import Item, Pixels, decode, of_size
from dvdp.data.sources.files import checked, image_files

CELEBA_COUNT = 202_599
_SIZE = (178, 218)
_CROP = 148
_LEFT, _TOP = ((resolution - _CROP) // 2 for resolution in _SIZE)


class CelebA:
    """The aligned faces of CelebA, from the zip of its owners or a folder of it: the middle 148x148 of 178x218 px.

    The crop is x from 15 to 163 and y from 35 to 183. An image of another size is unreadable. There are no labels.

    Args:
        count: expected number of images, over all three splits.

    Raises:
        UserError: the path is missing, or is no such folder or archive, or does not hold exactly ``count`` images.
    """

    needs: str | None = "img_align_celeba.zip, or a folder of it"
    labels: tuple[str, ...] = ()

    def __init__(self, path: Path | None, count: int = CELEBA_COUNT) -> None:
        assert path is not None, "checked by DatasetParams"
        self._path = path
        self.count = count
        self.left_out = checked(self._path, count, "img_align_celeba")

    def __iter__(self) -> Iterator[Item]:
        for name, read in image_files(self._path):
            yield Item(name, None, read, _face)


def _face(content: bytes) -> Pixels:
    image = of_size(decode(content), _SIZE)
    return np.ascontiguousarray(image[_TOP : _TOP + _CROP, _LEFT : _LEFT + _CROP])
