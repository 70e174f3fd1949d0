"""Any images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from dvdp.data.sources.base import Item, LeftOut, UnreadableImageError, decode
from dvdp.data.sources.files import Member, image_files, members
from dvdp.data.sources.formats import FORMATS
from dvdp.data.sources.labels import Images, Labels, by_files, by_folders, is_label_file, no_labels, read_label_files
from dvdp.errors import UserError

LabelsFrom = Literal["auto", "none", "folders", "file"]


class ImageFolder:
    """The image files of a folder, tar or zip, as :func:`dvdp.data.sources.files.members` finds them.

    Args:
        labels_from: what says which class an image has: the ``folders`` that hold them
            (:func:`~dvdp.data.sources.labels.by_folders`), a ``file`` beside them
            (:func:`~dvdp.data.sources.labels.by_files`), or ``none``. With ``auto`` it is files if there are any, else
            folders unless they are numbered parts.

    Raises:
        UserError: the path is missing, or is no folder, tar or zip, or holds no images; or a file of labels is missing,
            or wrong.
    """

    needs: str | None = "the folder, tar or zip of images to read"

    def __init__(self, path: Path | None, labels_from: LabelsFrom = "auto") -> None:
        assert path is not None, "checked by DatasetParams"
        self._path = path
        self._images = Images()
        self.left_out = LeftOut()
        files: dict[str, bytes] = {}
        for member in tqdm(members(path), desc="looking for images", unit="", disable=None, leave=False):
            if not member.left_out:
                self._images.add(member.name)
            elif labels_from in ("auto", "file") and _says_labels(member):
                files[member.name] = _content(member)
                self.left_out.add(member.name, "file of labels")
            else:
                self.left_out.add(member.name, member.left_out)
        self.count = len(self._images.keys)
        if not self.count:
            instead = f"; of other files: {self.left_out}" if self.left_out.counts else ""
            raise UserError(
                f"dataset.path: found no images in '{path}'{instead}, expected files of {', '.join(FORMATS)}."
            )
        self._labels = self._found(labels_from, files)
        self.labels, self.remarks = self._labels.names, self._labels.remarks

    def _found(self, labels_from: LabelsFrom, files: dict[str, bytes]) -> Labels:
        if labels_from == "none":
            return no_labels(self._images)
        said, remarks = read_label_files(files)
        if said:
            labels = by_files(said, self._images, lambda: (name for name, _ in image_files(self._path)))
        elif labels_from == "file":
            raise UserError(
                f"dataset.labels: found no file of labels in '{self._path}', expected dataset_tool's dataset.json, a"
                " CSV or JSONL with a column of files and one of labels, or .cls files; add one, or set dataset.labels"
                " to folders or none."
            )
        else:
            labels = by_folders(self._images, told=labels_from == "folders")
        return Labels(labels.names, labels.of_images, (*remarks, *labels.remarks))

    def __iter__(self) -> Iterator[Item]:
        place = -1
        for name, read in image_files(self._path):
            # Labels are known by the order of the images, of which some may have gone.
            try:
                place = self._images.keys.index(hash(name), place + 1)
            except ValueError:
                raise UserError(
                    f"dataset.path: found '{name}' in '{self._path}', which was not there when it was looked through,"
                    " expected no new files meanwhile; run the same command again when nothing writes there."
                ) from None
            label = self._labels.of_images[place]
            yield Item(name, self.labels[label] if label >= 0 else None, read, decode)


def _says_labels(member: Member) -> bool:
    # One that is hidden or a link is no part of the source.
    return member.left_out.startswith(("other format", "unreadable")) and is_label_file(member.name)


def _content(member: Member) -> bytes:
    try:
        return member.read()
    except UnreadableImageError as error:
        raise UserError(
            f"dataset.labels: cannot read '{member.name}' ({error}), expected a file of labels; mend or remove it, or"
            " set dataset.labels to folders or none."
        ) from None
