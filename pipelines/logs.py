"""Where status lines go: what is logged below ``dvdp``, to the terminal, to a file, or to a flow run in Prefect."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
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


#: Status lines of one task that Prefect gets at once, and the seconds in which it gets one more.
BURST, SECONDS_A_LINE = 20, 15.0


@dataclass
class Sparse:
    """Which lines a server gets of many: ``BURST`` at once, then one in ``SECONDS_A_LINE``, for each key."""

    _left: dict[Any, tuple[float, float, int]] = field(default_factory=dict)

    def take(self, key: Any, now: float) -> int | None:
        """How many lines of this key were left out before this one; None if this one is left out as well.

        Args:
            now: in seconds, rising.
        """
        left, before, skipped = self._left.get(key, (float(BURST), now, 0))
        left = min(float(BURST), left + (now - before) / SECONDS_A_LINE)
        self._left[key] = (left, now, skipped + 1) if left < 1 else (left - 1, now, 0)
        return None if left < 1 else skipped


@contextlib.contextmanager
def to_flow_run(flow_run: str | None) -> Iterator[None]:
    """Send status lines to the log of a flow run in Prefect, too, while the block runs; nowhere if that is None.

    What a task logs goes to the task, sparsely (:class:`Sparse`): the run's ``log.txt`` has all. Warnings all go.
    """
    if flow_run is None:
        yield
        return
    from prefect.context import TaskRunContext
    from prefect.logging.handlers import APILogHandler

    sparse = Sparse()

    def place(record: logging.LogRecord) -> bool:
        context = TaskRunContext.get()
        task = context.task_run.id if context else None
        record.flow_run_id, record.task_run_id = flow_run, task
        if record.levelno >= logging.WARNING:
            return True
        skipped = sparse.take(task, time.monotonic())
        record.skipped = f" ({skipped} lines before this one are in log.txt alone)" if skipped else ""
        return skipped is not None

    handler = APILogHandler()
    handler.addFilter(place)
    _add(handler, logging.Formatter("%(message)s%(skipped)s", defaults={"skipped": ""}))
    try:
        yield
    finally:
        logging.getLogger("dvdp").removeHandler(handler)


def _add(handler: logging.Handler, formatter: logging.Formatter = FORMAT) -> logging.Handler:
    handler.setFormatter(formatter)
    logger = logging.getLogger("dvdp")
    logger.setLevel(logging.INFO)
    # Prefect and Ray have handlers of their own at the root: each line is written once.
    logger.propagate = False
    logger.addHandler(handler)
    return handler
