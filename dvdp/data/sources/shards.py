"""Data sets that come as several files of one kind."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from dvdp.data.sources.base import LeftOut
from dvdp.data.sources.files import is_pattern, members
from dvdp.errors import UserError

#: What tells the files of one split from each other: ``-00000-of-00005.parquet``, ``_1.npz``, ``0007.tar.gz``.
_NUMBER = re.compile(r"[-_]?\d+(-of-\d+(-[0-9a-f]{8,})?)?(\.[a-z0-9]+)*$")


def shards(path: Path, kind: str, needs: str, left_out: LeftOut) -> list[Path]:
    """The files that ``path`` names, in the order of the numbers in their names.

    It is a file; a folder in and below which files are named like ``kind``, such as ``*.tar``; or a pattern such as
    ``data/train-*.tar``. Other files of a folder are added to ``left_out``.

    Raises:
        UserError: there is nothing, one of them cannot be read, or there are several splits in a folder.
    """
    folder = path.parent if is_pattern(path) else path
    if not folder.exists():
        raise UserError(f"dataset.path: found nothing at '{path}', expected {needs}; correct the path.")
    if not folder.is_dir():
        return [path]
    names = []
    for member in members(folder):
        fits = fnmatchcase(PurePosixPath(member.name).name, kind)
        if fits and member.left_out.startswith("unreadable"):
            raise UserError(f"dataset.path: '{folder / member.name}' is {member.left_out}; mend it or its rights.")
        if not fits or member.left_out not in ("", "other format"):
            left_out.add(member.name, member.left_out or "other kind of file")
        elif folder == path or fnmatchcase(member.name, path.name):
            names.append(member.name)
    splits = sorted({_NUMBER.sub("", name) for name in names})
    if not names:
        raise UserError(f"dataset.path: found no {kind} at '{path}', expected {needs}; correct the path.")
    if folder == path and len(splits) > 1:
        raise UserError(
            f"dataset.path: found several splits or data sets in '{path}' ({', '.join(splits[:5])}), expected the files"
            f" of one; give a pattern, such as '{path}/{splits[0]}*'."
        )
    return [folder / name for name in sorted(names, key=_by_number)]


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Names of classes, each once: numbers by their size, then others by the alphabet."""
    return tuple(sorted(set(labels), key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else name)))


def _by_number(name: str) -> list[str | int]:
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d{1,18})", name))]
