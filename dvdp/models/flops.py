"""What images cost: FLOPs of the network, counted, and the number of training images of a budget."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from dvdp.config import ModelParams, Run
from dvdp.models.unet import UNet


@lru_cache(maxsize=64)
def network_flops(model: ModelParams, resolution: int) -> int:
    """FLOPs of one forward pass of one image of this resolution (a multiply-add is two)."""
    with torch.device("meta"):
        network, x, t = UNet(model), torch.empty(1, 3, resolution, resolution), torch.empty(1)
        labels = torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, t, 0, labels)
    return counter.get_total_flops()


def level_flops(run: Run) -> list[int]:
    """Forward FLOPs of one image at each level, finest first."""
    return [network_flops(run.model, run.resolution >> level) for level in range(len(run.turning_points) + 1)]


def mean_flops(run: Run) -> float:
    """Expected forward FLOPs of one training image, over the levels' shares."""
    return sum(share * cost for share, cost in zip(run.build_schedule().shares(), level_flops(run), strict=True))


def relative_flops(run: Run) -> float:
    """Cost of an image relative to DDPM with the model of ``params.yaml``; its inverse bounds the speed-up."""
    return mean_flops(run) / network_flops(run.reference_model, run.resolution)


def training_images(run: Run) -> int:
    """Images the run is trained on, in whole batches; see ``training.budget``."""
    images = run.training.images / (relative_flops(run) if run.training.budget == "flops" else 1.0)
    return max(1, round(images / run.training.batch)) * run.training.batch
