"""Two runs never use the same cores: the later waits, or leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from dvdp.errors import UserError
from pipelines.jobs import machine
from pipelines.jobs.machine import Busy, holding_cores
from tests.logs import hearing
from tests.tracking.support import wait_until

HOLDER = """
import sys, time
from pipelines.jobs.machine import holding_cores
with holding_cores("leave", set(map(int, sys.argv[1:]))):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes that hold cores; no run of this machine holds any of these tests."""
    monkeypatch.setenv("SLURM_JOB_ID", f"test{os.getpid()}")
    monkeypatch.setattr(machine, "PAUSE", 0.05)
    started: list[subprocess.Popen[str]] = []

    def start(*cores: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, *map(str, cores)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout is not None
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_later_leaves_and_says_who_was_there(other: Callable[..., subprocess.Popen[str]]) -> None:
    holder = other(1, 2)
    with pytest.raises(Busy) as caught, holding_cores("leave", {0, 1}):
        raise AssertionError
    assert str(caught.value).startswith(
        f"cluster.busy: found the cores of this machine in use by process {holder.pid} ("
    )
    with holding_cores("leave", {0, 3}):
        pass
    with holding_cores("share", {1}):
        pass
    assert issubclass(Busy, UserError)


def test_the_later_waits_until_the_other_is_killed(other: Callable[..., subprocess.Popen[str]]) -> None:
    holder, lines, done = other(0, 1), list[str](), threading.Event()

    def work() -> None:
        with holding_cores("wait", {1, 2}):
            done.set()

    with hearing(lines.append):
        thread = threading.Thread(target=work)
        thread.start()
        wait_until(lambda: lines, 10)
        time.sleep(0.3)
        assert not done.is_set()
        # It holds none while it waits, so that two that wait for each other's cores both go on in the end.
        with holding_cores("leave", {2}):
            pass
        holder.send_signal(signal.SIGKILL)
        assert done.wait(10)
        thread.join()
    (line,) = lines
    assert line.startswith(f"waiting for the cores of this machine, which process {holder.pid} (")


def test_cores_are_free_after_the_block_and_in_what_it_started(
    other: Callable[..., subprocess.Popen[str]],
) -> None:
    with holding_cores("leave", {0}):
        child = subprocess.Popen(["sleep", "60"])
    try:
        with holding_cores("leave", {0}):
            pass
    finally:
        child.kill()
        child.wait()
    with pytest.raises(ValueError, match="x"), holding_cores("leave", {0}):
        raise ValueError("x")
    with holding_cores("leave"):
        assert machine._take([min(os.sched_getaffinity(0))], machine.contextlib.ExitStack())


def test_jobs_of_slurm_on_one_node_do_not_wait_for_each_other(
    other: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    other(0)
    monkeypatch.setenv("SLURM_JOB_ID", f"other{os.getpid()}")
    with holding_cores("leave", {0}):
        pass
