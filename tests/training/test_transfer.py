"""What goes to a device and back is what was handed over, in order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dvdp.data.loading import Batch
from dvdp.training.transfer import to_device, to_host

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


def batches(number: int) -> list[Batch]:
    source = torch.Generator().manual_seed(0)
    return [
        Batch(torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8, generator=source), torch.full((16,), i))
        for i in range(number)
    ]


def work(device: torch.device) -> None:
    """What keeps a GPU busy for longer than a copy takes."""
    x = torch.ones(2048, 2048, device=device) if device.type == "cuda" else torch.ones(2, 2)
    for _ in range(20):
        x = x @ x


@pytest.mark.parametrize("name", DEVICES)
def test_every_batch_comes_once_and_in_order_and_is_asked_for_when_its_turn_comes(name: str) -> None:
    device, expected, asked = torch.device(name), batches(20), []

    def source() -> Iterator[Batch]:
        for i, batch in enumerate(expected):
            asked.append(i)
            yield batch

    sums = []
    for i, batch in enumerate(to_device(source(), device)):
        assert asked == list(range(i + 1))
        assert batch.images.device.type == name
        assert batch.labels.device.type == "cpu"
        assert batch.labels.tolist() == [i] * 16
        work(device)
        # Read late, on the device, when the memory of batches before has been used again.
        sums.append((batch.images.long() * torch.arange(64, device=device)).sum((1, 2, 3)))
        del batch
    assert len(sums) == len(expected)
    for found, batch in zip(sums, expected, strict=True):
        assert torch.equal(found.cpu(), (batch.images.long() * torch.arange(64)).sum((1, 2, 3)))


@pytest.mark.parametrize("name", DEVICES)
def test_images_come_back_as_they_were_when_their_copy_was_begun(name: str) -> None:
    device = torch.device(name)
    expected = [batch.images for batch in batches(10)]
    pending = []
    for images in expected:
        work(device)
        there = images.to(device)
        pending.append(to_host(there + 0))
        del there
    for wait, images in zip(pending, expected, strict=True):
        assert wait().device.type == "cpu"
        assert torch.equal(wait(), images)
