"""Where status lines go: what is logged below ``dvdp``, in one format, to the terminal or to a file."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

#: Of a file of status lines; some 100,000 of them.
MOST_BYTES = 10 * 2**20
FORMAT = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")


class _Terminal(logging.Handler):
    """Prints to what is stdout at the time, which a test or a progress bar may have exchanged."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def to_terminal() -> None:
    """Print status lines from now on; a second call changes nothing.

    What the encoding of the terminal lacks is printed as an escape.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not any(isinstance(handler, _Terminal) for handler in logging.getLogger("dvdp").handlers):
        _add(_Terminal())


@contextlib.contextmanager
def to_file(path: Path) -> Iterator[None]:
    """Add status lines to a file while the block runs; one that is full is kept as ``<name>.1``, and begun anew."""
    options: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "delay": True}
    handler = _add(RotatingFileHandler(path, maxBytes=MOST_BYTES, backupCount=1, **options))
    try:
        yield
    finally:
        logging.getLogger("dvdp").removeHandler(handler)
        handler.close()


def _add(handler: logging.Handler) -> logging.Handler:
    handler.setFormatter(FORMAT)
    logger = logging.getLogger("dvdp")
    logger.setLevel(logging.INFO)
    # Prefect and Ray have handlers of their own at the root: each line is written once.
    logger.propagate = False
    logger.addHandler(handler)
    return handler
