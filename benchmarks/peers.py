"""The same network from Hugging Face diffusers, to stand beside ours. Only the benchmarks know it, where installed."""

from __future__ import annotations

import copy
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dvdp.config import Run
from dvdp.models.pixels import to_float
from dvdp.training.ema import EMA

#: What the benchmarks say where it is missing.
MISSING = "diffusers: found no such package, so its column is left out; pip install diffusers to have it."


def available() -> bool:
    """Whether diffusers is installed."""
    return importlib.util.find_spec("diffusers") is not None


def build(run: Run) -> nn.Module:
    """``UNet2DModel`` with the blocks, widths, resampling, heads and modulation of :class:`dvdp.models.unet.UNet`."""
    from diffusers import UNet2DModel

    model = run.model
    factors = [2**i for i in range(len(model.channel_mult))]
    attends = [factor in model.attention_factors for factor in factors]
    groups = min(32, model.model_channels // 4)
    return UNet2DModel(
        in_channels=3,
        out_channels=3,
        block_out_channels=tuple(model.model_channels * multiplier for multiplier in model.channel_mult),
        layers_per_block=model.num_res_blocks,
        down_block_types=tuple("AttnDownBlock2D" if here else "ResnetDownsampleBlock2D" for here in attends),
        up_block_types=tuple("AttnUpBlock2D" if here else "ResnetUpsampleBlock2D" for here in reversed(attends)),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=min(model.num_head_channels, model.model_channels),
        norm_num_groups=groups,
        attn_norm_num_groups=groups,
        dropout=model.dropout,
    )


def forward_flops(run: Run) -> int:
    """FLOPs of one forward pass of one full-size image, as :func:`dvdp.models.flops.network_flops` counts ours."""
    with torch.device("meta"):
        network, x, t = build(run), torch.empty(1, 3, run.resolution, run.resolution), torch.zeros(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, t)
    return counter.get_total_flops()


class Peer:
    """Trains and samples DDPM with their network and scheduler: same optimiser, clipping and average as ours."""

    def __init__(self, run: Run, device: torch.device) -> None:
        from diffusers import DDPMScheduler

        self.run, self.device = run, device
        self.network = build(run).to(device).train()
        self.ema = EMA(self.network, run.training.ema_halflife_images, run.training.ema_ramp)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=run.training.learning_rate, weight_decay=0.0, fused=True
        )
        self.scheduler = DDPMScheduler(num_train_timesteps=run.schedule.timesteps)

    def step(self, images: Tensor) -> None:
        """A training step on uint8 images, as the package's own example of unconditional training makes it."""
        x0 = to_float(images.to(self.device))
        noise = torch.randn_like(x0)
        t = torch.randint(0, self.run.schedule.timesteps, (len(x0),), device=self.device)
        x = self.scheduler.add_noise(x0, noise, t)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.training.precision == "bf16"):
            output = self.network(x, t).sample
        F.mse_loss(output.float(), noise).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.run.training.clip_norm)
        self.optimizer.step()
        self.ema.update(100_000, len(images))

    @torch.no_grad()
    def sample(self, count: int, steps: int) -> None:
        """Ancestral sampling by their scheduler."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps)
        x = torch.randn(count, 3, self.run.resolution, self.run.resolution, device=self.device)
        for t in scheduler.timesteps:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.training.precision == "bf16"):
                output = self.ema.network(x, t).sample
            x = scheduler.step(output.float(), t, x).prev_sample
