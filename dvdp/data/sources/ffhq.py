"""FFHQ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dvdp.data.sources.base import Item, Pixels, decode, of_size
from dvdp.data.sources.files import checked, image_files

FFHQ_COUNT = 70_000
#: Of the aligned faces and their thumbnails; the unaligned photographs, as many, have all sizes.
_SIZES = ((1024, 1024), (128, 128))


class Ffhq:
    """The aligned faces of FFHQ, or their thumbnails, from a folder, tar or zip of one of the two.

    The folders of a thousand images each are no classes: there are no labels. An image of another size is unreadable.

    Args:
        count: expected number of images.

    Raises:
        UserError: the path is missing, or is no such folder or archive, or does not hold exactly ``count`` images.
    """

    needs: str | None = "the folder or archive of images1024x1024 or thumbnails128x128"
    labels: tuple[str, ...] = ()

    def __init__(self, path: Path | None, count: int = FFHQ_COUNT) -> None:
        assert path is not None, "checked by DatasetParams"
        self._path = path
        self.count = count
        self.left_out = checked(self._path, count, "images1024x1024 or thumbnails128x128")

    def __iter__(self) -> Iterator[Item]:
        for name, read in image_files(self._path):
            yield Item(name, None, read, _face)


def _face(content: bytes) -> Pixels:
    return of_size(decode(content), *_SIZES)
