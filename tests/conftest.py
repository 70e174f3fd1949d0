"""What holds for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Here and in what tests start: several threads of several processes wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def fp32_on_every_machine() -> Iterator[None]:
    """``precision: auto`` is fp32 in the tests' own process, so that they compute the same on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dvdp.precision.cpu_capabilities", dict)
        yield
