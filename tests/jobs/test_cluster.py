"""Work on the cluster takes what nobody else needs of it, and leaves the rest alone."""

from __future__ import annotations

import threading
import time
from itertools import product

import pytest

from dvdp.config import ClusterParams
from pipelines.jobs.cluster import cluster, on_workers


def at_once(spans: list[tuple[float, float]]) -> int:
    """The most that went on at any time."""
    return max(sum(start <= at < end for start, end in spans) for at, _ in spans)


@pytest.mark.slow
def test_tasks_take_the_slots_that_are_left_and_give_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    params = ClusterParams(threads=1)

    def work(seconds: float, _: int) -> tuple[float, float]:
        start = time.time()
        time.sleep(seconds)
        return start, time.time()

    with cluster(params) as slots:
        tasks = list(product([0.5], range(4)))
        list(on_workers(params, work, tasks, threading.Semaphore(1)))  # Two processes are up.
        assert at_once(list(on_workers(params, work, tasks, threading.Semaphore(0)))) == 1
        left = threading.Semaphore(1)
        assert at_once(list(on_workers(params, work, tasks, left))) == 2
        assert left.acquire(blocking=False), "given back"
        assert not left.acquire(blocking=False), "once"
        with slots:
            found = list(on_workers(params, work, tasks, slots))
        assert len(found) == len(tasks)

        def broken(_: int) -> None:
            raise ValueError("broken")

        left = threading.Semaphore(1)
        with pytest.raises(Exception, match="broken"):
            list(on_workers(params, broken, [(0,), (1,)], left))
        assert left.acquire(blocking=False), "given back after a failure too"
