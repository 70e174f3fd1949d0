"""What holds for every test."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pytest
import torch

# Here and in what tests start: several threads of several processes wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def fp32_on_every_machine() -> Iterator[None]:
    """``precision: auto`` is fp32 in the tests' own process, so that they compute the same on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dvdp.precision.cpu_instructions", set)
        yield


@pytest.fixture(scope="session", autouse=True)
def forks_can_train() -> None:
    """The autograd engine counts devices once: with a fake GPU it would find one, and not run in a fork."""
    torch.ones((), requires_grad=True).backward()  # type: ignore[no-untyped-call]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What tests of odd names print or log becomes UTF-8, which processes of pytest-xdist exchange."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
