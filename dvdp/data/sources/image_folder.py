"""Any images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dvdp.data.sources.base import Item, LeftOut, decode
from dvdp.data.sources.files import image_files, looked_through
from dvdp.data.sources.formats import FORMATS
from dvdp.errors import UserError


class ImageFolder:
    """The image files of a folder, tar or zip, as :func:`dvdp.data.sources.files.image_files` finds them.

    Label: the name of the folder that holds the image; none if that is the root, which is the deepest folder below
    which all images lie. So ``<class>/x.png``, ``<split>/<class>/x.png`` and ``<only folder>/<class>/x.png`` have
    their classes, and a folder of nothing but images has none.

    Raises:
        UserError: the path is missing, or is no folder, tar or zip, or holds no images.
    """

    needs: str | None = "the folder, tar or zip of images to read"

    def __init__(self, path: Path | None) -> None:
        assert path is not None, "checked by DatasetParams"
        self._path = path
        self.count = 0
        folders: set[tuple[str, ...]] = set()
        self.left_out = LeftOut()
        for member in looked_through(self._path, self.left_out):
            self.count += 1
            folders.add(PurePosixPath(member.name).parts[:-1])
        if not self.count:
            instead = f"; of other files: {self.left_out}" if self.left_out.counts else ""
            raise UserError(
                f"dataset.path: found no images in '{self._path}'{instead}, expected files of {', '.join(FORMATS)}."
            )
        self._root = next(iter(folders))
        for folder in folders:
            while self._root != folder[: len(self._root)]:
                self._root = self._root[:-1]
        self.labels = tuple(sorted({folder[-1] for folder in folders if folder != self._root}))

    def __iter__(self) -> Iterator[Item]:
        for name, read in image_files(self._path):
            folder = PurePosixPath(name).parts[:-1]
            yield Item(name, None if folder == self._root else folder[-1], read, decode)
