"""What a run will cost: FLOPs counted, seconds and memory measured on a few steps."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dvdp.config import ModelParams, Run
from dvdp.models.unet import UNet


@lru_cache(maxsize=64)
def network_flops(model: ModelParams, side: int) -> int:
    """FLOPs of one forward pass of one image of this side (a multiply-add is two)."""
    with torch.device("meta"):
        network, x, t = UNet(model), torch.empty(1, 3, side, side), torch.empty(1)
        labels = torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, t, 0, labels)
    return counter.get_total_flops()


def level_flops(run: Run) -> list[int]:
    """Forward FLOPs of one image at each level, finest first."""
    return [network_flops(run.model, run.side >> level) for level in range(len(run.turning_points) + 1)]


def mean_flops(run: Run) -> float:
    """Expected forward FLOPs of one training image, over the levels' shares."""
    return sum(share * cost for share, cost in zip(run.schedule().shares(), level_flops(run), strict=True))


def relative_flops(run: Run) -> float:
    """Cost of an image relative to DDPM with the model of ``params.yaml``; its inverse bounds the speed-up."""
    return mean_flops(run) / network_flops(run.reference_model, run.side)


def training_images(run: Run) -> int:
    """Images the run is trained on, in whole batches; see ``training.budget``."""
    images = run.training.images / (relative_flops(run) if run.training.budget == "flops" else 1.0)
    return max(1, round(images / run.training.batch)) * run.training.batch


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
    mean = sum(share * s for share, s in zip(run.schedule().shares(), seconds, strict=True))
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
