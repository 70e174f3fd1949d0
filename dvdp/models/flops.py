"""What images cost: FLOPs of the network, and the number of training images of a budget.

They are counted from the sizes alone, as the UNet would take seconds to build; a test compares them with torch's count.
"""

from __future__ import annotations

from functools import lru_cache

from dvdp.config import ModelParams, Run
from dvdp.diffusion.spans import level_shares
from dvdp.models.layout import Attention, Block, unet_layout


@lru_cache(maxsize=1024)
def network_flops(model: ModelParams, resolution: int) -> int:
    """FLOPs of one forward pass of one image of this resolution (a multiply-add is two)."""
    width, embedding, pixels = model.model_channels, 4 * model.model_channels, resolution**2

    def multiply_adds(layer: Block | Attention) -> int:
        before, after = layer.pixels(resolution)
        if isinstance(layer, Attention):
            return 4 * before * layer.width**2 + 2 * before**2 * layer.width
        inputs, outputs = layer.inputs, layer.width
        # Upsampling, it runs as a transposed convolution, with 4x4 taps on the pixels that come in.
        first = 16 * before if layer.resample == "up" else 9 * after
        skip = after * inputs * outputs if inputs != outputs else 0
        return first * inputs * outputs + 9 * after * outputs**2 + skip + 2 * embedding * outputs

    ends = width * embedding + embedding**2 + 27 * pixels * width * (1 + model.channel_mult[0])
    return 2 * (ends + sum(map(multiply_adds, unet_layout(model).layers)))


def level_flops(run: Run) -> list[int]:
    """Forward FLOPs of one image at each level, finest first."""
    return [network_flops(run.model, run.resolution >> level) for level in range(len(run.turning_points) + 1)]


def training_shares(run: Run) -> list[float]:
    """The share of the training images that each level has, finest first: by its timesteps, or all alike."""
    levels = len(run.turning_points) + 1
    return [1 / levels] * levels if run.at_all_timesteps else level_shares(run.turning_points, run.schedule.timesteps)


def mean_flops(run: Run) -> float:
    """Expected forward FLOPs of one training image, over the levels' shares."""
    return sum(share * cost for share, cost in zip(training_shares(run), level_flops(run), strict=True))


def relative_flops(run: Run) -> float:
    """Cost of an image relative to DDPM with the model of ``params.yaml``; its inverse bounds the speed-up."""
    return mean_flops(run) / network_flops(run.reference_model, run.resolution)


def sample_flops(run: Run) -> int:
    """FLOPs of one image that is drawn as the run's sampling says, lifts left out."""
    # It imports torch, which takes longer than all that is counted here.
    from dvdp.diffusion.timesteps import share_steps

    calls = share_steps(run.build_schedule(), run.sampling.steps, run.sampling.timestep_spacing, run.sampling.share)
    return sum(count * flops for count, flops in zip(calls, sampling_flops(run), strict=True))


def sampling_flops(run: Run) -> list[int]:
    """FLOPs of one step of one image at each level, finest first: two passes where guidance needs both predictions."""
    return [guided_passes(run.sampling.guidance(k)) * flops for k, flops in enumerate(level_flops(run))]


def guided_passes(scale: float) -> int:
    """Passes of the network in a step under a guidance scale; 0 and 1 need one of both predictions alone."""
    return 1 if scale in (0.0, 1.0) else 2


def ddpm_step_flops(run: Run) -> int:
    """FLOPs of one sampling step of one image of DDPM, guided if the run is at any level."""
    levels = range(len(run.turning_points) + 1)
    passes = max(guided_passes(run.sampling.guidance(level)) for level in levels)
    return passes * network_flops(run.reference_model, run.resolution)


def training_flops(run: Run) -> float:
    """Of all passes of training, forward and backward (three times the forward)."""
    return 3 * training_images(run) * mean_flops(run)


def training_images(run: Run) -> int:
    """Images the run is trained on, in whole batches; see ``training.budget``."""
    images = run.training.images / (relative_flops(run) if run.training.budget == "flops" else 1.0)
    return max(1, round(images / run.training.batch)) * run.training.batch
