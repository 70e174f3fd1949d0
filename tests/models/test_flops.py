"""FLOPs counted from sizes alone are those that torch counts in a forward pass."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dvdp.config import ModelParams
from dvdp.models.flops import network_flops
from dvdp.models.unet import UNet


@pytest.mark.parametrize(
    ("model", "resolution"),
    [
        (ModelParams(), 32),
        (ModelParams(), 8),
        (ModelParams(model_channels=8, channel_mult=(3,), attention_factors=(), num_classes=0), 4),
        (ModelParams(model_channels=8, channel_mult=(1, 1), attention_factors=(1, 2), num_res_blocks=3), 6),
        (ModelParams(model_channels=16, channel_mult=(4, 2, 1), num_head_channels=16, networks="per_level"), 16),
        (ModelParams(model_channels=64, channel_mult=(1, 1, 2, 3), attention_factors=(2, 8), num_res_blocks=2), 64),
        (ModelParams(model_channels=12, channel_mult=(2, 1, 5), attention_factors=(4,), num_head_channels=4), 20),
    ],
)
def test_flops_are_those_that_torch_counts(model: ModelParams, resolution: int) -> None:
    with torch.device("meta"):
        network, x, t = UNet(model), torch.empty(1, 3, resolution, resolution), torch.empty(1)
        labels = torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, t, 0, labels)
    assert network_flops(model, resolution) == counter.get_total_flops()
