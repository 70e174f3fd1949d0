"""What images cost: FLOPs of the network, and the number of training images of a budget.

They are counted from the sizes alone, as the UNet would take seconds to build; a test compares them with torch's count.
"""

from __future__ import annotations

from functools import lru_cache

from dvdp.config import ModelParams, Run
from dvdp.diffusion.spans import level_shares


@lru_cache(maxsize=1024)
def network_flops(model: ModelParams, resolution: int) -> int:
    """FLOPs of one forward pass of one image of this resolution (a multiply-add is two)."""
    widths = [model.model_channels * multiplier for multiplier in model.channel_mult]
    embedding, last = 4 * model.model_channels, len(widths) - 1
    pixels = [(resolution >> i) ** 2 for i in range(len(widths))]

    def block(inputs: int, outputs: int, stage: int) -> int:
        convolutions = 9 * inputs * outputs + 9 * outputs**2 + (inputs * outputs if inputs != outputs else 0)
        return pixels[stage] * convolutions + 2 * embedding * outputs

    def upsampling(width: int, stage: int) -> int:
        # Its first convolution runs as a transposed one, with 4x4 taps on the pixels of the coarser stage.
        return block(width, width, stage - 1) + (16 * pixels[stage] - 9 * pixels[stage - 1]) * width**2

    def attention(width: int, stage: int) -> int:
        return 4 * pixels[stage] * width**2 + 2 * pixels[stage] ** 2 * width

    def stage(inputs: int, i: int) -> int:
        return block(inputs, widths[i], i) + (attention(widths[i], i) if 2**i in model.attention_factors else 0)

    width = model.model_channels
    skips = [width]
    total = width * embedding + embedding**2 + 27 * width * pixels[0]
    for i, outputs in enumerate(widths):
        for _ in range(model.num_res_blocks):
            total += stage(width, i)
            width = outputs
            skips.append(width)
        if i < last:
            total += block(width, width, i + 1)
            skips.append(width)
    total += 2 * block(width, width, last) + attention(width, last)
    for i, outputs in reversed(list(enumerate(widths))):
        for j in range(model.num_res_blocks + 1):
            total += stage(width + skips.pop(), i)
            width = outputs
            if i > 0 and j == model.num_res_blocks:
                total += upsampling(width, i)
    return 2 * (total + 27 * width * pixels[0])


def level_flops(run: Run) -> list[int]:
    """Forward FLOPs of one image at each level, finest first."""
    return [network_flops(run.model, run.resolution >> level) for level in range(len(run.turning_points) + 1)]


def mean_flops(run: Run) -> float:
    """Expected forward FLOPs of one training image, over the levels' shares."""
    shares = level_shares(run.turning_points, run.schedule.timesteps)
    return sum(share * cost for share, cost in zip(shares, level_flops(run), strict=True))


def relative_flops(run: Run) -> float:
    """Cost of an image relative to DDPM with the model of ``params.yaml``; its inverse bounds the speed-up."""
    return mean_flops(run) / network_flops(run.reference_model, run.resolution)


def training_images(run: Run) -> int:
    """Images the run is trained on, in whole batches; see ``training.budget``."""
    images = run.training.images / (relative_flops(run) if run.training.budget == "flops" else 1.0)
    return max(1, round(images / run.training.batch)) * run.training.batch
