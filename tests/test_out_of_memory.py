"""Where memory runs out, work goes on with fewer images at a time, and its log says so."""

from __future__ import annotations

import pytest
import torch

from dvdp.out_of_memory import OutOfMemory, in_batches, ran_out
from tests.logs import hearing

CPU = torch.device("cpu")


def test_batches_are_halved_where_memory_runs_out_and_every_image_is_done_once() -> None:
    tried: list[tuple[int, int]] = []
    said: list[str] = []

    def work(start: int, count: int) -> list[int]:
        tried.append((start, count))
        if count > (5 if start < 20 else 2):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return list(range(start, start + count))

    with hearing(said.append):
        found = list(in_batches(work, 4, 27, 10, CPU, "sampling.batch"))
    assert [image for _, part in found for image in part] == list(range(4, 27))
    assert all(part[0] == start for start, part in found)
    assert tried == [(4, 10), (4, 5), (9, 5), (14, 5), (19, 5), (24, 3), (24, 2), (26, 1)]
    assert [line.split("; ")[0::2] for line in said] == [
        ["sampling.batch: memory ran out with 10 images at a time", "it goes on with 5 at a time"],
        ["sampling.batch: memory ran out with 3 images at a time", "it goes on with 2 at a time"],
    ]


def test_what_fails_for_another_reason_fails_at_once() -> None:
    def work(start: int, count: int) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match=r"^shapes cannot"):
        list(in_batches(work, 0, 8, 4, CPU, "sampling.batch"))


def test_no_memory_for_one_image_is_a_sentence() -> None:
    def work(start: int, count: int) -> None:
        raise MemoryError

    with pytest.raises(OutOfMemory) as caught:
        list(in_batches(work, 0, 8, 4, CPU, "sampling.batch"))
    assert str(caught.value).startswith(
        "sampling.batch: memory ran out with one image at a time, 4 were asked for; the machine has "
    )
    assert str(caught.value).endswith("GiB free; use a smaller network or a device with more memory.")


def test_want_of_memory_is_found_below_what_was_raised_from_it() -> None:
    error = RuntimeError("compilation failed")
    assert not ran_out(error)
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory.")
    assert ran_out(error)
