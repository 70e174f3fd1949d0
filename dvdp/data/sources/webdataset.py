"""Tars of webdataset."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from dvdp.data.sources.base import Item, LeftOut, UnreadableImageError, decode
from dvdp.data.sources.files import Member, members
from dvdp.data.sources.shards import in_order, shards
from dvdp.errors import UserError

_MOST_LETTERS = 100


class WebDataset:
    """Shards whose neighbours of one name up to the first dot are a sample: an image, and its class in ``.cls``.

    Parts of a sample that are neither (text, masks, ``.input.png``) are left out. A sample without ``.cls`` has no
    label.

    Raises:
        UserError: the path is missing, or holds no tars, damaged ones or those of several splits; there is no image;
            or a sample has several of them, or a class that is no word or number.
    """

    needs: str | None = "a .tar of webdataset, a folder of them, or a pattern such as 'data/train-*.tar'"

    def __init__(self, path: Path | None) -> None:
        assert path is not None, "checked by DatasetParams"
        self.left_out = LeftOut()
        self._shards = shards(path, "*.tar", str(self.needs), self.left_out)
        self._labels: list[str | None] = []
        names: dict[str, str] = {}
        for shard in tqdm(self._shards, desc="looking for images", unit="shard", disable=None, leave=False):
            for key, sample in groupby(members(shard), _key):
                label, images = None, list[str]()
                for member in sample:
                    if _is_image(member):
                        images.append(member.name)
                    elif _extension(member) == "cls" and member.left_out == "other format":
                        label = _class(shard, member)
                        label = names.setdefault(label, label)
                    else:
                        self.left_out.add(f"{shard.name}/{member.name}", member.left_out or "other part of a sample")
                if len(images) > 1:
                    raise UserError(
                        f"dataset.path: found {len(images)} images in sample '{key}' of '{shard}'"
                        f" ({', '.join(images[:5])}), expected one; remove the others."
                    )
                if images:
                    self._labels.append(label)
                elif label is not None:
                    self.left_out.add(f"{shard.name}/{key}.cls", "class without an image")
        self.count = len(self._labels)
        self.labels = in_order(label for label in self._labels if label is not None)
        if not self.count:
            raise UserError(
                f"dataset.path: found no images in '{path}' ({self.left_out}), expected samples such as 0001.jpg and"
                " 0001.cls."
            )

    def __iter__(self) -> Iterator[Item]:
        images = ((shard, member) for shard in self._shards for member in members(shard) if _is_image(member))
        for label, (shard, member) in zip(self._labels, images, strict=True):
            yield Item(f"{shard.name}/{member.name}", label, member.read, decode)


def _key(member: Member) -> str:
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _extension(member: Member) -> str:
    return member.name.rpartition("/")[2].partition(".")[2].lower()


def _is_image(member: Member) -> bool:
    return not member.left_out and "." not in _extension(member)


def _class(shard: Path, member: Member) -> str:
    try:
        content = member.read()
    except UnreadableImageError as error:
        raise UserError(f"dataset.path: cannot read '{member.name}' of '{shard}' ({error}); correct it.") from None
    text = content.decode(errors="replace").strip()
    if not text.isprintable() or not 0 < len(text) <= _MOST_LETTERS or "\N{REPLACEMENT CHARACTER}" in text:
        raise UserError(
            f"dataset.path: found {content[:50]!r} in '{member.name}' of '{shard}', expected a class as a number or a"
            " word; correct it."
        )
    return str(int(text)) if text.isdecimal() else text
