"""Copies between the host and a GPU beside what the GPU computes; on a CPU there is nothing to copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from dvdp.data.loading import Batch


def to_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches; a GPU has been sent the images of each, and may still be at work on what it was given before.

    Labels stay on the host, pinned: one can look at them without waiting.
    """
    if device.type != "cuda":
        yield from batches
        return
    aside, steps = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for batch in batches:
        images, labels = (part.pin_memory() for part in batch)
        with torch.cuda.stream(aside):
            images = images.to(device, non_blocking=True)
        steps.wait_stream(aside)
        # It was allocated for the other stream, which must not use it again before the step has read it.
        images.record_stream(steps)
        yield Batch(images, labels)


def to_host(images: Tensor) -> Callable[[], Tensor]:
    """Begin to copy images to the host; what is returned waits for them, in any thread, and gives them."""
    if images.device.type != "cuda":
        return lambda: images
    aside = torch.cuda.Stream(images.device)
    aside.wait_stream(torch.cuda.current_stream(images.device))
    with torch.cuda.stream(aside):
        # PyTorch pins the result of such a copy.
        copied = images.to("cpu", non_blocking=True)
    images.record_stream(aside)
    # Whoever waits for it sleeps, where others would keep a core busy.
    there = torch.cuda.Event(blocking=True)
    there.record(aside)

    def wait() -> Tensor:
        there.synchronize()
        return copied

    return wait
