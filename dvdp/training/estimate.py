"""What training will take, measured on a few steps: seconds and memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from dvdp.config import Run
from dvdp.models.flops import mean_flops, training_images


@dataclass(frozen=True)
class Estimate:
    """What training will take."""

    images: int
    flops: float
    """Of all passes, forward and backward (three times the forward)."""
    seconds: float
    memory_bytes: int
    """Peak of one worker."""

    def sentence(self) -> str:
        """For people."""
        minutes, seconds = divmod(round(self.seconds), 60)
        return (
            f"{self.images:,} images, {self.flops:.2e} FLOPs, about {minutes} min {seconds:02d} s,"
            f" {self.memory_bytes / 2**30:.1f} GiB a worker"
        )


def estimate(run: Run, network: nn.Module, step: Callable[[int], int], device: torch.device) -> Estimate:
    """Time what a step does at each level.

    Args:
        network: gathers gradients; hand it a copy.
        step: runs the images that a step has of a level forward and backward through the network; returns how many,
            over all ranks.
    """
    seconds = []
    for level in range(len(run.turning_points) + 1):
        count, times = step(level), []
        for _ in range(3):
            _wait(device)
            start = time.perf_counter()
            step(level)
            _wait(device)
            times.append(time.perf_counter() - start)
        # The least disturbed: other runs may be starting.
        seconds.append(min(times) / count)
    images = training_images(run)
    mean = sum(share * s for share, s in zip(run.build_schedule().shares(), seconds, strict=True))
    # Adam's two moments and the average come on top of what the trial held.
    state = 3 * sum(p.numel() * p.element_size() for p in network.parameters())
    return Estimate(
        images=images,
        flops=3 * images * mean_flops(run),
        seconds=images * mean,
        memory_bytes=peak_memory(device) + state,
    )


def peak_memory(device: torch.device) -> int:
    """Most memory this process has held so far, in bytes: on its GPU, else in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
