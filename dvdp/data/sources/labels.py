"""Which class an image has: by the folder that holds it, or by files beside it."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice, pairwise
from pathlib import PurePosixPath
from posixpath import join, normpath, splitext
from typing import Any

from dvdp.errors import UserError

#: Names of parts of a data set, in lower case: folders that are all named so are no classes.
SPLITS = frozenset(["train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"])
#: Columns of a table of labels, in lower case; of several the first is taken.
FILE_COLUMNS = (
    "file_name",
    "filename",
    "file",
    "file_path",
    "filepath",
    "path",
    "image",
    "image_name",
    "image_path",
    "image_id",
    "id",
)
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target", "label_name", "class_id")

_NUMBER = re.compile(r"[0-9]{5,18}")
_SHARD = re.compile(r"(?:shard|part|chunk|batch)[-_]?[0-9]+", re.IGNORECASE)
_WHOLE = re.compile(r"0|[1-9][0-9]{0,17}")
#: Names that a remark lists, at most.
_MOST = 5
_OTHERWISE = "or set dataset.labels to folders or none"

Label = int | str
Entries = list[tuple[str, Any]]
"""Images as a file of labels names them, each with what it says of it."""


class _NoLabelsError(Exception):
    """A file that could be one of labels has none; the text says what it has."""


@dataclass(frozen=True)
class Labels:
    """The classes of a source, and that of each image."""

    names: tuple[str, ...]
    """By their numbers."""
    of_images: array[int]
    """Their numbers, in the order of the images; -1 for none."""
    remarks: tuple[str, ...] = ()
    """What to know about how they were found, a sentence each."""


@dataclass
class Images:
    """The images of a source in their order, in twelve bytes each, as there may be millions."""

    keys: array[int] = field(default_factory=lambda: array("q"))
    """Hash of the path of each within the source."""
    places: array[int] = field(default_factory=lambda: array("i"))
    """Number of the folder of each."""
    folders: dict[str, int] = field(default_factory=dict)

    def add(self, name: str) -> None:
        """Append an image, by its path within the source."""
        self.keys.append(hash(name))
        self.places.append(self.folders.setdefault(name.rpartition("/")[0], len(self.folders)))


def no_labels(images: Images, remarks: Iterable[str] = ()) -> Labels:
    """No classes."""
    return Labels((), array("i", [-1]) * len(images.keys), tuple(remarks))


# By folders


def by_folders(images: Images, told: bool) -> Labels:
    """The class of an image is the name of the folder that holds it; none if that is the root.

    The root is the deepest folder below which all images lie. Folders at its top that are all named for a split
    (:data:`SPLITS`) do not count, so that ``train/cat`` and ``val/cat`` are one class. Other folders of one name
    (``a/cat``, ``b/cat``) are classes of their own, named by their path. Names that differ only in whether Unicode
    composes their accents are one.

    Args:
        told: that folders are classes. Otherwise numbered parts of a data set (shards) do not count: folders that all
            are numbers of one width, at least five digits, and count up by one or by one power of ten, or that all are
            called ``shard-0`` or the like.
    """
    paths = _below_root([PurePosixPath(_composed(folder)).parts for folder in images.folders])
    remarks = []
    tops = {path[0] for path in paths if path}
    if len(tops) > 1 and () not in paths and {top.lower() for top in tops} <= SPLITS:
        paths = _below_root([path[1:] for path in paths])
        remarks.append(f"the folders {_listed(tops)} are splits and no classes.")
    leaves = {path[-1] for path in paths if path}
    if not told and _are_shards(leaves):
        paths = _below_root([path[:-1] for path in paths])
        remarks.append(
            f"the numbered folders {_listed(leaves)} are parts of the data set and no classes; if they are, set"
            " dataset.labels to folders."
        )
    elif not told and all(leaf.isdecimal() for leaf in leaves) and any(re.match("0.", leaf) for leaf in leaves):
        remarks.append(
            f"the numbered folders {_listed(leaves)} are classes; if they are not, set dataset.labels to none."
        )
    same: dict[str, set[tuple[str, ...]]] = {}
    for path in filter(None, paths):
        same.setdefault(path[-1], set()).add(path)
    several = {"/".join(path) for found in same.values() if len(found) > 1 for path in found}
    if several:
        remarks.append(f"folders of one name in several places are classes of their own: {_listed(several)}.")
    labels = [whole if (whole := "/".join(path)) in several else "".join(path[-1:]) for path in paths]
    return _numbered(sorted(set(labels) - {""}), (labels[place] for place in images.places), remarks)


def _below_root(paths: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Without what all of them begin with."""
    least, most = min(paths), max(paths)
    common = next((i for i, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), min(len(least), len(most)))
    return [path[common:] for path in paths]


def _are_shards(names: Iterable[str]) -> bool:
    found = sorted(names)
    if len(found) < 2 or not all(map(_NUMBER.fullmatch, found)):
        return len(found) > 1 and all(map(_SHARD.fullmatch, found))
    steps = {int(b) - int(a) for a, b in pairwise(found)}
    return len(set(map(len, found))) == 1 and len(steps) == 1 and re.fullmatch("10*", str(*steps)) is not None


# By files


def is_label_file(name: str) -> bool:
    """Whether a file of this path may say which classes images have."""
    file = name.rpartition("/")[2].lower()
    return file in ("dataset.json", "metadata.parquet") or file.endswith((".csv", ".tsv", ".jsonl", ".cls"))


def read_label_files(files: Mapping[str, bytes]) -> tuple[dict[str, Entries], list[str]]:
    """What each file says, and a remark on each that is not about labels.

    - ``dataset.json`` as NVlabs' dataset_tool writes it: ``{"labels": [["00000/img00000000.png", 6], ..]}``, or null
      for no labels;
    - a CSV (also with ";" or tabs), or JSONL with an object a line, with a column of :data:`FILE_COLUMNS` and one of
      :data:`LABEL_COLUMNS`, such as ``metadata.jsonl`` of the image-folder convention;
    - webdataset's ``a.cls`` beside ``a.jpg``, with the class alone.

    Args:
        files: content of each that :func:`is_label_file`, by its path.

    Raises:
        UserError: a file cannot be read, or says something else than a class.
    """
    found: dict[str, Entries] = {}
    remarks = []
    for file, content in files.items():
        try:
            found[file] = _entries(file, content)
        except _NoLabelsError as why:
            remarks.append(f"'{file}' {why}, and is not read as a file of labels.")
    return found, remarks


def by_files(said: Mapping[str, Entries], images: Images, names: Callable[[], Iterator[str]]) -> Labels:
    """The class of an image is what files say, together of each image and of no other.

    They name images by the path from their own folder, or from the top of the source; without its suffix, or with
    accents composed otherwise, where that is one image's. Classes that are numbers have the order of numbers.

    Args:
        said: by :func:`read_label_files`. If it is nothing, there are no classes.
        names: gives the paths of the images anew.

    Raises:
        UserError: they name images that are not there, or one image twice with different classes, miss images, or mix
            numbers and names.
    """
    if not any(said.values()):
        return no_labels(images, [f"{_files(said)} says that there are no labels."])
    found: dict[int, Label] = {}
    known = set(images.keys)

    @cache
    def loosely() -> dict[int, int | None]:
        return _loosely(names())

    for file, entries in _beside(said, names).items():
        _add(found, file, entries, known, loosely)
    missing = [i for i, key in enumerate(images.keys) if key not in found]
    if missing:
        raise UserError(
            f"dataset.labels: found no label of {len(missing):,} of {len(images.keys):,} images in {_files(said)},"
            f" '{next(islice(names(), missing[0], None))}' first, expected one of each; add them, {_OTHERWISE}."
        )
    if all(isinstance(label, int) or _WHOLE.fullmatch(label) for label in found.values()):
        found = {key: int(label) for key, label in found.items()}
    classes: list[Any] = list(dict.fromkeys(found.values()))
    numbers, words = ([label for label in classes if isinstance(label, kind)] for kind in (int, str))
    if numbers and words:
        raise UserError(
            f"dataset.labels: found numbers and names of classes, such as {numbers[0]} and '{words[0]}', in"
            f" {_files(said)}, expected one kind; mend that, {_OTHERWISE}."
        )
    remarks = [f"the labels are those of {_files(said)}."]
    return _numbered(sorted(classes), (found[key] for key in images.keys), remarks)


def _loosely(names: Iterable[str]) -> dict[int, int | None]:
    """Hash of a path, with or without suffix, accents composed -> hash of the one image's path; None if several."""
    found: dict[int, int | None] = {}
    for name in names:
        for text in {_composed(name), _composed(splitext(name)[0])}:
            key = hash(text)
            found[key] = hash(name) if key not in found else None
    return found


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _add(
    found: dict[int, Label],
    file: str,
    entries: Entries,
    known: Collection[int],
    loosely: Callable[[], Mapping[int, int | None]],
) -> None:
    """Add what a file says to what others say, each image by the hash of its path."""
    folder = file.rpartition("/")[0]
    strangers = []
    for name, label in entries:
        paths = [normpath(join(top, path)) for path in (name, name.replace("\\", "/")) for top in (folder, "")]
        key = next((key for path in paths if (key := hash(path)) in known), None)
        if key is None:
            keys = (loosely().get(hash(_composed(path))) for path in paths)
            key = next((key for key in keys if key is not None), None)
        if key is None:
            strangers.append(name)
        elif found.setdefault(key, label) != label:
            raise UserError(
                f"dataset.labels: '{file}' says that '{name}' is of class '{label}', expected '{found[key]}' as said"
                f" before; mend that, {_OTHERWISE}."
            )
    if strangers:
        raise UserError(
            f"dataset.labels: '{file}' names {len(strangers):,} images that are not there or are left out,"
            f" '{strangers[0]}' first, expected paths from its folder of images of dataset.path; mend that,"
            f" {_OTHERWISE}."
        )


def _beside(said: Mapping[str, Entries], names: Callable[[], Iterator[str]]) -> dict[str, Entries]:
    """With the image's name in place of that of a .cls file: up to its suffix, or as in webdataset to the first dot."""
    wanted = {file[: -len(".cls")] for file in said if _is_cls(file)}
    images: dict[str, list[str]] = {}
    for name in names() if wanted else ():
        folder, slash, file = name.rpartition("/")
        stems = (name.rpartition(".")[0], folder + slash + file.partition(".")[0])
        stem = next((stem for stem in stems if stem in wanted), None)
        if stem is not None:
            images.setdefault(stem, []).append(PurePosixPath(name).name)
    return {
        file: [(name, label) for _, label in entries for name in images.get(file[: -len(".cls")], [file])]
        if _is_cls(file)
        else entries
        for file, entries in said.items()
    }


def _is_cls(file: str) -> bool:
    return file.lower().endswith(".cls")


def _entries(file: str, content: bytes) -> Entries:
    """What a file says; raises _NoLabelsError if it is not about labels, UserError if it is and cannot be read."""
    kind, where = file.rpartition(".")[2].lower(), f"'{file}'"
    if kind == "parquet":
        raise _wrong(where, "is a Parquet file", "the same as CSV or JSONL")
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    # Names of files may be of another encoding.
    text = content.decode(encoding, "surrogateescape" if encoding == "utf-8-sig" else "replace")
    if kind == "cls":
        return [(file, _label(where, text))]
    if kind == "json":
        return _of_dataset_json(where, text)
    rows = _objects(where, text) if kind == "jsonl" else _rows(where, text)
    if not rows:
        raise _NoLabelsError("is empty")
    columns = {str(key).strip().lower(): key for _, row in rows for key in row}
    name, label = (next((columns[c] for c in known if c in columns), None) for known in (FILE_COLUMNS, LABEL_COLUMNS))
    if name is None or label is None:
        raise _NoLabelsError(f"has the columns {_listed(columns, ordered=True)}, none of files and one of labels")
    for number, row in rows:
        if not isinstance(row.get(name), str) or not row[name]:
            raise _wrong(where, f"has no '{name}' in line {number}", "the path of an image")
    return [(row[name], _label(f"{where}, line {number},", row.get(label))) for number, row in rows]


def _of_dataset_json(where: str, text: str) -> Entries:
    tree = _json(where, text)
    if not isinstance(tree, Mapping) or "labels" not in tree:
        raise _NoLabelsError("has no key 'labels'")
    pairs = [] if tree["labels"] is None else tree["labels"]
    if not isinstance(pairs, list) or not all(
        isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) for p in pairs
    ):
        raise _wrong(where, f"has {_short(pairs)} as 'labels'", '[["00000/img00000000.png", 6], ..] or null')
    return [(name, _label(f"{where}, '{name}',", label)) for name, label in pairs]


def _objects(where: str, text: str) -> list[tuple[int, dict[str, Any]]]:
    """The lines of a JSONL, with their numbers."""
    rows = [(n, _json(f"{where}, line {n},", line)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, row in rows:
        if not isinstance(row, dict):
            raise _wrong(where, f"has {_short(row)} in line {number}", "an object a line")
    return rows


def _rows(where: str, text: str) -> list[tuple[int, dict[str, Any]]]:
    """The lines of a CSV after its header, with their numbers; by the delimiter that gives it most columns."""
    head = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), skipinitialspace=True)
    try:
        return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise _wrong(where, f"is no CSV ({error})", "a header, then a line for each image") from None


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(where, f"is no JSON ({error})", "whole JSON") from None


def _label(where: str, value: Any) -> Label:
    text = _composed(value.strip()) if isinstance(value, str) else value
    if (isinstance(text, str) and text and "\n" not in text) or (type(text) is int and text >= 0):
        return text
    raise _wrong(where, f"has {_short(value)} as a label", "one class, a name or a number from 0")


def _wrong(where: str, found: str, expected: str) -> UserError:
    return UserError(f"dataset.labels: {where} {found}, expected {expected}; mend that, {_OTHERWISE}.")


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}.."


def _files(files: Iterable[str]) -> str:
    return _listed(f"'{file}'" for file in files)


def _listed(names: Iterable[str], ordered: bool = False) -> str:
    """The first of some names, for people."""
    found = list(names) if ordered else sorted(names)
    return ", ".join(found[:_MOST]) + (f", .. ({len(found):,})" if len(found) > _MOST else "")


def _numbered(classes: Sequence[Label], labels: Iterable[Label], remarks: Iterable[str]) -> Labels:
    """Classes in their order, and those of the images; "" is none."""
    index: dict[Label, int] = {label: i for i, label in enumerate(classes)}
    return Labels(tuple(map(str, classes)), array("i", (index.get(label, -1) for label in labels)), tuple(remarks))
