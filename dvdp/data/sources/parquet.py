"""Parquet files of images, as the Hugging Face hub stores data sets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from dvdp.data.sources.base import Item, LeftOut, UnreadableImageError, decode
from dvdp.data.sources.shards import in_order, shards
from dvdp.errors import UserError

#: Rows that are in memory at a time.
_ROWS = 16


class Parquet:
    """Rows with an image file in column ``image`` and, if there is one, a class in column ``label``.

    Columns of other names are found by the hub's metadata, if these tell of one image and one class. Classes are those
    that the metadata name, in their order, or else the values of the column; -1 and null are none.

    Raises:
        UserError: the path is missing, or holds no parquet files, damaged ones, those of several splits, or such as
            have no columns of this kind; or pyarrow is not installed.
    """

    needs: str | None = "a .parquet file, a folder of them, or a pattern such as 'data/train-*.parquet'"

    def __init__(self, path: Path | None) -> None:
        assert path is not None, "checked by DatasetParams"
        self.left_out = LeftOut()
        self._files = shards(path, "*.parquet", str(self.needs), self.left_out)
        with _opened(self._files[0]) as first:
            self._image, self._label, names = _columns(self._files[0], first.schema_arrow)
        self.count = 0
        found: set[Any] = set()
        for file in self._files:
            with _opened(file) as opened:
                if _columns(file, opened.schema_arrow) != (self._image, self._label, names):
                    raise UserError(
                        f"dataset.path: found other columns or classes in '{file}' than in '{self._files[0]}', expected"
                        " the files of one data set; give a pattern that names these alone."
                    )
                self.count += opened.metadata.num_rows
                if self._label:
                    for batch in opened.iter_batches(columns=[self._label], use_threads=False):
                        found.update(batch.column(0).unique().to_pylist())
        found -= {None, -1}
        if names and (strange := found - set(range(len(names)))):
            raise UserError(
                f"dataset.path: found {min(strange, key=str)} in column '{self._label}' of '{path}', expected 0 to"
                f" {len(names) - 1}, or -1 for none, by the classes in its metadata."
            )
        self._names: dict[Any, str] = dict(enumerate(names)) or {value: str(value) for value in found}
        self.labels = names or in_order(self._names.values())

    def __iter__(self) -> Iterator[Item]:
        for file in self._files:
            row = 0
            with _opened(file) as opened:
                columns = [name for name in (self._image, self._label) if name]
                for batch in opened.iter_batches(_ROWS, columns=columns, use_threads=False):
                    labels = batch.column(self._label).to_pylist() if self._label else [None] * batch.num_rows
                    for image, label in zip(batch.column(self._image), labels, strict=True):
                        yield Item(f"{file.name}/{row:06d}", self._names.get(label), partial(_content, image), decode)
                        row += 1


def _content(image: Any) -> bytes:
    value = image.as_py()
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if not content:
        raise UnreadableImageError(f"no image, but the path '{path}' of a file elsewhere" if path else "no image")
    return bytes(content)


def _columns(file: Path, schema: Any) -> tuple[str, str | None, tuple[str, ...]]:
    """The columns of images and, if there is one, of classes; and the classes' names, if the metadata have them."""
    from pyarrow import types

    features: dict[str, Any] = {}
    with suppress(ValueError, KeyError, TypeError):
        features = dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    kinds = {name: kind for name, kind in features.items() if isinstance(kind, dict) and name in schema.names}

    def found(usual: str, kind: str) -> str | None:
        named = [name for name, feature in kinds.items() if feature.get("_type") == kind]
        if usual in schema.names:
            return usual
        if len(named) > 1:
            raise UserError(
                f"dataset.path: found columns {', '.join(named)} of kind {kind} in '{file}', expected one, or one of"
                f" the name '{usual}'; rename or remove the others."
            )
        return named[0] if named else None

    image, label = found("image", "Image"), found("label", "ClassLabel")
    if image is None:
        raise UserError(
            f"dataset.path: found columns {', '.join(schema.names)} in '{file}', expected one called 'image' with image"
            " files; rename it."
        )
    kind = schema.field(image).type
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise UserError(
            f"dataset.path: found {str(kind)[:100]} in column '{image}' of '{file}', expected image files as bytes;"
            " save it with the feature Image of datasets."
        )
    if label is None:
        return image, None, ()
    kind = schema.field(label).type
    if not (types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)):
        raise UserError(
            f"dataset.path: found {str(kind)[:100]} in column '{label}' of '{file}', expected a class as a whole number"
            " or text; rename the column, or make it one."
        )
    names = tuple(map(str, kinds.get(label, {}).get("names") or ())) if types.is_integer(kind) else ()
    if len(set(names)) < len(names):
        raise UserError(
            f"dataset.path: found two classes of one name in the metadata of '{file}', expected different ones."
        )
    return image, label, names


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile; what is wrong with it is a UserError."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(
            "dataset.source: parquet needs pyarrow, which is not installed; run `pip install pyarrow`."
        ) from None
    try:
        # By pages: a group of rows can be as large as the file.
        with ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as opened:
            yield opened
    except (ArrowException, OSError) as error:
        raise UserError(
            f"dataset.path: '{file}' is no parquet file, or a damaged one ({' '.join(str(error).split())}); download it"
            " again."
        ) from None
