"""The layers of the UNet as plain numbers: it is built from them, and costs are counted from them without torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from dvdp.config import ModelParams

Resample = Literal["down", "up"] | None
#: Up to so many pixels attention may hold its whole matrix of weights.
FEW_PIXELS = 256


@dataclass(frozen=True)
class Block:
    """A residual block."""

    inputs: int
    width: int
    """Channels of its output."""
    halvings: int
    """Of the images' resolution, at its input."""
    resample: Resample = None

    def pixels(self, resolution: int) -> tuple[int, int]:
        """Of its input and of its output."""
        after = self.halvings + {"down": 1, "up": -1, None: 0}[self.resample]
        return (resolution >> self.halvings) ** 2, (resolution >> after) ** 2


@dataclass(frozen=True)
class Attention:
    """Self-attention."""

    width: int
    halvings: int

    def pixels(self, resolution: int) -> tuple[int, int]:
        """As those of a block."""
        return ((resolution >> self.halvings) ** 2,) * 2


Stage = tuple[Block | Attention, ...]


@dataclass(frozen=True)
class Layout:
    """The encoder's outputs, and the stem's, join the decoder's inputs."""

    encoder: list[Stage]
    middle: Stage
    decoder: list[Stage]

    @property
    def stages(self) -> list[Stage]:
        """All of them, in the order that they run in."""
        return [*self.encoder, self.middle, *self.decoder]

    @property
    def layers(self) -> list[Block | Attention]:
        """Of all stages."""
        return [layer for stage in self.stages for layer in stage]


@lru_cache(maxsize=64)
def unet_layout(model: ModelParams) -> Layout:
    """What lies between the first and the last convolution."""
    widths = [model.model_channels * multiplier for multiplier in model.channel_mult]
    last = len(widths) - 1

    def stage(inputs: int, i: int) -> Stage:
        attention = [Attention(widths[i], i)] if 2**i in model.attention_factors else []
        return (Block(inputs, widths[i], i), *attention)

    width = model.model_channels
    encoder: list[Stage] = []
    decoder: list[Stage] = []
    skips = [width]
    for i, outputs in enumerate(widths):
        for _ in range(model.num_res_blocks):
            encoder.append(stage(width, i))
            width = outputs
            skips.append(width)
        if i < last:
            encoder.append((Block(width, width, i, "down"),))
            skips.append(width)
    middle = (Block(width, width, last), Attention(width, last), Block(width, width, last))
    for i, outputs in reversed(list(enumerate(widths))):
        for j in range(model.num_res_blocks + 1):
            up = (Block(outputs, outputs, i, "up"),) if i > 0 and j == model.num_res_blocks else ()
            decoder.append((*stage(width + skips.pop(), i), *up))
            width = outputs
    return Layout(encoder, middle, decoder)


def norm_groups(width: int) -> int:
    """Of a group norm: up to 32 of at least 4 channels."""
    return next(g for g in range(min(32, max(1, width // 4)), 0, -1) if width % g == 0)


def attention_heads(width: int, num_head_channels: int) -> int:
    """Of self-attention of this width."""
    return max(1, width // num_head_channels)
