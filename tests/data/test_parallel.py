"""Work over processes comes back in order, and little of it is taken ahead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from dvdp.data.parallel import mapped


@pytest.mark.parametrize("workers", [0, 2])
def test_results_are_in_order_and_few_tasks_are_taken_ahead(workers: int) -> None:
    taken = 0

    def tasks() -> Iterator[int]:
        nonlocal taken
        for taken in range(10_000):
            yield -taken

    with closing(mapped(abs, tasks(), workers)) as results:
        for i in range(500):
            assert next(results) == i
            assert taken - i <= 2 * workers + 1
