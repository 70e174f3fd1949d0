"""What writing a store needs of its place, checked before any work."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dvdp.data.records import DIGEST_BYTES, Form
from dvdp.data.store import check_replaceable
from dvdp.errors import UserError

_PAGE = 4096
#: Share of the raw bytes that images take at least: only flat graphics take less as PNG or JPEG, photographs several
#: times as much.
_LEAST = {"raw": 1.0, "png": 0.1, "jpeg": 0.03}


def check_places(out: Path, report: Path | None) -> None:
    """See that a store can be put at ``out`` and a report be written; makes the folders that they go to.

    Raises:
        UserError: the store's place is a link, a mount point or something that is no store; the report's is a folder or
            in the store; or one of them cannot be written.
    """
    part = out.with_name(f".{out.name}.part")
    with writing(out):
        for folder in (out, part):
            kind = "a link" if folder.is_symlink() else "a mount point" if os.path.ismount(folder) else ""
            if kind:
                instead = "remove it" if folder == part else "give a folder below it, or what it leads to"
                raise UserError(
                    f"data set: '{folder}' is {kind}, expected a folder or nothing there, as a complete store is"
                    f" renamed to '{out}'; {instead}."
                )
        check_replaceable(out)
        for path in (out, *(folder / "x" for folder in (out, part, part / "store") if folder.exists())):
            _probe(path)
    if report is None:
        return
    with writing(report):
        if report.is_dir() or any(report.absolute().is_relative_to(folder.absolute()) for folder in (out, part)):
            raise UserError(
                f"data set: the report '{report}' is a folder or inside the store, which is replaced as a whole,"
                " expected a file beside it; give another path."
            )
        _probe(report)


def check_space(out: Path, form: Form, count: int) -> None:
    """Raise UserError if the disk cannot hold so many images."""
    value = 4 + round(_LEAST[form.encoding] * 3 * form.resolution**2)
    # LMDB keeps two values or more in a page, or gives a value pages of its own.
    pages = 1 / (_PAGE // (value + 24)) if value < _PAGE // 2 - 24 else -(-(value + 16) // _PAGE)
    needed = round(count * (pages * _PAGE + DIGEST_BYTES))
    part = out.with_name(f".{out.name}.part")
    written = sum(file.stat().st_blocks * 512 for file in part.rglob("*") if file.is_file())
    free = shutil.disk_usage(out.parent).free
    if needed > free + written:
        raise UserError(
            f"data set: found {free:,} bytes free for '{out}', expected {needed - written:,} or more for"
            f" {count:,} images of {form.resolution} px as {form.encoding}; free some, or choose another folder,"
            " dataset.encoding or dataset.resolution."
        )


def _probe(path: Path) -> None:
    """Write and remove a file of the longest name that :func:`dvdp.files.write_atomically` takes for one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    aside.touch()
    aside.unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever goes wrong when ``path`` is written is a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"data set: cannot write '{path}' ({error.strerror or error}), expected free space on its disk and the"
            " right to write; mend that and run the same command, which goes on from here."
        ) from None
