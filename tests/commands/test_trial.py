"""What `dvdp check --trial` finds of the largest part of a step that fits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import pytest
import torch

from dvdp import hardware
from dvdp.data.loading import Batch
from dvdp.errors import UserError
from dvdp.training.loop import Training
from dvdp.training.memory import worker_memory
from dvdp.training.shortage import cut_to
from pipelines.commands.trial import counted_part, first_part, least, measure, tried_part
from tests.training.test_fit import at_most, memory_for, pictures, run_of

CPU = torch.device("cpu")


def started(folder: Path, accumulation: int) -> tuple[Training, Iterator[Batch]]:
    """Of DDPM, 16 images a step."""
    run = run_of(points=(), accumulation=accumulation)
    batch = Batch(torch.zeros((16, 3, 16, 16), dtype=torch.uint8), torch.full((16,), -1))
    return Training(run, pictures(), folder, "trial", False, CPU, None), repeat(batch)


@pytest.mark.parametrize("fits", range(1, 21))
def test_the_least_that_fits_is_found_in_few_tries(fits: int) -> None:
    tried: list[int] = []

    def holds(number: int) -> bool:
        tried.append(number)
        return number >= fits

    assert least(holds, 20) == fits
    assert len(tried) <= 5
    assert 20 not in tried, "which is known"


@pytest.mark.parametrize(
    ("accumulation", "room", "first", "largest"),
    [(1, 16, 16, 16), (1, 7, 4, 6), (4, 7, 4, 6), (4, 3, 2, 3), (16, 100, 1, 16), (2, 1, 1, 1)],
)
def test_on_a_gpu_larger_and_smaller_parts_are_tried(
    tmp_path: Path, accumulation: int, room: int, first: int, largest: int
) -> None:
    """Sizes are those that an accumulation gives: 16, 8, 6, 4, 3, 2, 1 images."""
    training, batches = started(tmp_path, accumulation)
    with memory_for(at_most(room)):
        assert first_part(training, batches, None) == (first, 1.0)
        assert tried_part(training, batches, first) == largest


def test_no_memory_for_one_image_is_a_sentence(tmp_path: Path) -> None:
    training, batches = started(tmp_path, 1)
    with memory_for(lambda _: False), pytest.raises(UserError, match=r"^--trial: small has no memory for one image at"):
        first_part(training, batches, None)


def test_on_a_cpu_the_largest_part_is_counted_from_the_peak_of_a_smaller_one() -> None:
    run = run_of(points=(), batch=4096)
    counts = {part: worker_memory(cut_to(run, 1, part), 1, False) for part in (256, 512, 1024, 4096)}
    # The process took a tenth more than is counted, and grows twice as fast.
    memory, slope = round(1.1 * counts[256]), 2.0
    for part, accumulation in ((512, 8), (1024, 4), (4096, 1)):
        limit = memory + 2 * (counts[part] - counts[256])
        assert counted_part(run, 256, memory, slope, limit) == part
        less = counted_part(run, 256, memory, slope, limit - 1)
        assert less == math.ceil(4096 / (accumulation + 1))
    assert counted_part(run, 256, memory, slope, 2**60) == 4096
    assert counted_part(run, 256, memory, slope, memory) == 256


def test_a_trial_takes_parts_that_the_machine_has_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(points=(), batch=512, images=512)
    needed = worker_memory(run, 1, False), worker_memory(cut_to(run, 1, 128), 1, False)
    monkeypatch.setattr(hardware, "memory", lambda: 2 * needed[0])
    found = measure(run, ranks=1, threads=1, gpu=False, flip=False, store=None)
    assert (found.part, found.largest_part, found.counted) == (512, 512, False)
    monkeypatch.setattr(hardware, "memory", lambda: needed[1])
    found = measure(run, ranks=1, threads=1, gpu=False, flip=False, store=None)
    assert found.part == 128, "512 and 256 are not even tried"
