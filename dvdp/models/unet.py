"""The improved UNet of Dhariwal & Nichol (*Diffusion Models Beat GANs*, 2021), over images of several levels.

It is fully convolutional, so one set of weights serves every level's resolution. A learned embedding of the level
joins the one of the timestep: at a turning point the meaning of the input changes at once, which a smooth embedding
of t cannot say. In a class-conditional network, so does one of the class.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dvdp.config import ModelParams
from dvdp.diffusion.bands import pool
from dvdp.errors import UserError
from dvdp.models import layout
from dvdp.models.ops import attend, convolve_doubled, group_norm, group_norm_silu


class UNet(nn.Module):
    """Residual UNet with multi-resolution self-attention and adaptive group norm.

    Args:
        params: its size.
        levels: K of the process; the network serves levels 0 .. K.
        channels: of the images.
        activation_checkpointing: keep of every stage its input alone, and compute the rest again in the backward pass.
    """

    def __init__(
        self, params: ModelParams, levels: int = 0, channels: int = 3, activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        width = params.model_channels
        embedding = 4 * width
        self.time = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.level = nn.Embedding(levels + 1, embedding)
        nn.init.zeros_(self.level.weight)
        # The last one is for images without a label.
        self.classes = nn.Embedding(params.num_classes + 1, embedding) if params.num_classes else None
        if self.classes is not None:
            nn.init.zeros_(self.classes.weight)
        self.width = width

        def stage(layers: layout.Stage) -> Stage:
            return Stage(
                ResidualBlock(layer.inputs, layer.width, params.dropout, layer.resample)
                if isinstance(layer, layout.Block)
                else Attention(layer.width, params.num_head_channels)
                for layer in layers
            )

        stages = layout.unet_layout(params)
        # Of all residual blocks, and not in them: the backward pass comes to these last, and ranks exchange gradients
        # of neighbours together.
        self.modulations = nn.ModuleList(
            nn.Linear(embedding, 2 * layer.width) for layer in stages.layers if isinstance(layer, layout.Block)
        )
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.encoder = nn.ModuleList(map(stage, stages.encoder))
        self.middle = stage(stages.middle)
        self.decoder = nn.ModuleList(map(stage, stages.decoder))
        width *= params.channel_mult[0]
        self.head = nn.Sequential(norm(width), nn.SiLU(), zeroed(nn.Conv2d(width, channels, 3, padding=1)))

    def forward(self, x: Tensor, t: Tensor, level: int, labels: Tensor | None = None) -> Tensor:
        """(B, C, h, w) states of one level, (B,) timesteps and (B,) classes -> (B, C, h, w).

        Args:
            labels: -1 for an image without one; not looked at by an unconditional network.

        Raises:
            UserError: no labels, and the network is class-conditional.
        """
        dtype = self.stem.weight.dtype
        embedding = self.time(sinusoids(t, self.width).to(dtype)) + self.level.weight[level]
        if self.classes is not None:
            if labels is None:
                raise UserError(
                    "labels: found none, expected one for each image, as this network is conditional on"
                    f" {self.classes.num_embeddings - 1} classes; give them, or draw with TrainedModel.sample."
                )
            # Not by indexing the weights, whose gradient threads of a CPU add in any order.
            embedding = embedding + self.classes(torch.where(labels < 0, self.classes.num_embeddings - 1, labels))
        embedding = F.silu(embedding).to(dtype)
        modulations = self._modulations(embedding)
        h = self.stem(x.to(dtype))
        skips = [h]
        for layers in self.encoder:
            h = self._stage(layers, modulations, h)
            skips.append(h)
        h = self._stage(self.middle, modulations, h)
        for layers in self.decoder:
            h = self._stage(layers, modulations, h, skips.pop())
        return self.head[2](group_norm_silu(h, cast(nn.GroupNorm, self.head[0])))

    def _modulations(self, embedding: Tensor) -> Iterator[Tensor]:
        """Of every residual block, in the order that they run in: one product in place of forty small ones."""
        layers = [cast(nn.Linear, layer) for layer in self.modulations]
        weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
        return iter(F.linear(embedding, weight, bias).split([layer.out_features for layer in layers], dim=1))

    def _stage(self, layers: nn.Module, modulations: Iterator[Tensor], *parts: Tensor) -> Tensor:
        own = [next(modulations) for layer in layers.children() if isinstance(layer, ResidualBlock)]
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(layers, own, *parts, use_reentrant=False)
        return layers(own, *parts)


class Stage(nn.ModuleList):
    """Layers one after the other: what is computed again, compiled and shared between ranks as a whole."""

    def forward(self, modulations: Sequence[Tensor], *parts: Tensor) -> Tensor:
        """Apply the layers to the joined parts, giving each residual block its modulation."""
        h = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        left = iter(modulations)
        for layer in self:
            h = layer(h, next(left)) if isinstance(layer, ResidualBlock) else layer(h)
        return h


class LevelNetworks(nn.Module):
    """One UNet for each level, as subspace diffusion has it; a step trains the one of its level alone."""

    def __init__(
        self, params: ModelParams, levels: int, channels: int = 3, activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(UNet(params, 0, channels, activation_checkpointing) for _ in range(levels + 1))

    def forward(self, x: Tensor, t: Tensor, level: int, labels: Tensor | None = None) -> Tensor:
        """As :meth:`UNet.forward`."""
        return self.networks[level](x, t, 0, labels)


def build_network(params: ModelParams, levels: int, activation_checkpointing: bool = False) -> UNet | LevelNetworks:
    """The network, or networks, of a process with so many turning points; see :class:`UNet`."""
    kind = LevelNetworks if params.networks == "per_level" else UNet
    return kind(params, levels, activation_checkpointing=activation_checkpointing)


class ResidualBlock(nn.Module):
    """BigGAN residual block: resampling inside both branches, scale and shift from the embedding by the network."""

    def __init__(self, inputs: int, outputs: int, dropout: float, resample: layout.Resample = None) -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        h = group_norm_silu(x, self.norm1)
        if self.resample == "up":
            h, x = convolve_doubled(h, self.conv1), F.interpolate(x, scale_factor=2.0)
        else:
            if self.resample == "down":
                h, x = pool(h, 4), pool(x, 4)
            h = self.conv1(h)
        h = group_norm_silu(h, self.norm2, modulation)
        return self.skip(x) + self.conv2(self.dropout(h))


class Attention(nn.Module):
    """Self-attention over the pixels of a feature map."""

    def __init__(self, width: int, num_head_channels: int) -> None:
        super().__init__()
        self.heads = layout.attention_heads(width, num_head_channels)
        self.norm = norm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = zeroed(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(group_norm(x, self.norm)).reshape(b, 3, self.heads, c // self.heads, h * w).unbind(1)
        return x + self.out(attend(q, k, v).reshape(b, c, h, w))


def norm(width: int) -> nn.GroupNorm:
    """Group norm with as many groups as its width allows."""
    return nn.GroupNorm(layout.norm_groups(width), width)


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """A layer that starts as zero, so that every residual branch and the network start as nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def sinusoids(t: Tensor, width: int) -> Tensor:
    """Timestep embedding (B,) -> (B, width): cosines and sines at periods from 2 pi to 20,000 pi."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
