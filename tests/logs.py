"""What the code logs, for tests."""

import contextlib
import logging
from collections.abc import Callable, Iterator


class _Hearing(logging.Handler):
    def __init__(self, hear: Callable[[str], None]) -> None:
        super().__init__()
        self.hear = hear

    def emit(self, record: logging.LogRecord) -> None:
        self.hear(record.getMessage())


@contextlib.contextmanager
def hearing(hear: Callable[[str], None]) -> Iterator[None]:
    """Call ``hear`` with each status line; what it raises ends what logs."""
    logger, handler = logging.getLogger("dvdp"), _Hearing(hear)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


class InterruptedHere(Exception):  # noqa: N818
    """What a test throws into a run."""


@contextlib.contextmanager
def stop_after(seen: int) -> Iterator[None]:
    """End the training loop, by InterruptedHere, as it logs that it has seen so many images."""

    def hear(line: str) -> None:
        if f" {seen} / " in line:
            raise InterruptedHere

    with hearing(hear):
        yield
