"""The network and what it prediction_type."""

import pytest
import torch
import torch.nn.functional as F

from dvdp import Process, Schedule, UserError
from dvdp.config import ModelParams
from dvdp.diffusion.bands import pool
from dvdp.models.denoiser import NetworkDenoiser, example
from dvdp.models.flops import network_flops
from dvdp.models.ops import attend, convolve_doubled
from dvdp.models.unet import UNet

SMALL = ModelParams(
    model_channels=8,
    channel_mult=(1, 2, 2),
    num_res_blocks=2,
    attention_factors=(2, 4),
    num_head_channels=8,
    num_classes=0,
)


def awake(network: torch.nn.Module) -> torch.nn.Module:
    """Undo the zero initialisation, which would hide what a test looks for."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return network


@pytest.mark.parametrize(("level", "resolution"), [(0, 32), (1, 16), (2, 8)])
def test_one_network_serves_every_level(level: int, resolution: int) -> None:
    network = UNet(SMALL, levels=2)
    x, t = torch.randn(2, 3, resolution, resolution), torch.tensor([5, 900])
    output = network(x, t, level)
    assert output.shape == x.shape
    assert not output.any(), "the network starts as nothing"


def test_the_output_depends_on_pixels_time_and_level() -> None:
    network = awake(UNet(SMALL, levels=1)).eval()
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([100])
    base = network(x, t, 0)
    for other in (network(x + 0.1, t, 0), network(x, t + 50, 0), network(x, t, 1)):
        assert (other - base).abs().max() > 1e-3


def test_dropout_is_off_in_evaluation() -> None:
    network = awake(
        UNet(ModelParams(model_channels=8, channel_mult=(1,), attention_factors=(), dropout=0.5, num_classes=0))
    ).eval()
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([10])
    assert torch.equal(network(x, t, 0), network(x, t, 0))
    network.train()
    assert not torch.equal(network(x, t, 0), network(x, t, 0))


@pytest.mark.parametrize(
    ("params", "resolution", "millions", "gmacs"),
    [
        (
            ModelParams(
                model_channels=128,
                channel_mult=(1, 2, 2, 2),
                num_res_blocks=3,
                attention_factors=(2, 4),
                num_head_channels=64,
                num_classes=0,
            ),
            32,
            57.1,
            8.8,
        ),
        (
            ModelParams(
                model_channels=128,
                channel_mult=(1, 1, 2, 2, 4, 4),
                num_res_blocks=2,
                attention_factors=(8, 16, 32),
                num_head_channels=64,
                num_classes=0,
            ),
            256,
            138.3,
            267.8,
        ),
    ],
    ids=["32 px preset", "256 px preset"],
)
def test_the_presets_have_the_stated_size(params: ModelParams, resolution: int, millions: float, gmacs: float) -> None:
    with torch.device("meta"):
        network = UNet(params)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    assert network_flops(params, resolution) / 2e9 == pytest.approx(gmacs, rel=0.01)


def test_half_the_resolution_costs_at_most_a_quarter() -> None:
    # Convolutions cost exactly a quarter, self-attention a sixteenth.
    for resolution in (32, 16):
        assert 4 < network_flops(SMALL, resolution) / network_flops(SMALL, resolution // 2) < 16


def test_a_convolution_of_a_doubled_image_is_the_one_of_its_enlargement() -> None:
    generator = torch.Generator().manual_seed(0)
    conv = torch.nn.Conv2d(5, 7, 3, padding=1).double()
    x = torch.randn(2, 5, 6, 4, generator=generator, dtype=torch.float64)
    gradients = []
    for double in (convolve_doubled, lambda x, conv: conv(F.interpolate(x, scale_factor=2.0))):
        conv.zero_grad()
        double(x, conv).sin().sum().backward()
        gradients.append((conv.weight.grad, conv.bias.grad))
    torch.testing.assert_close(convolve_doubled(x, conv), conv(F.interpolate(x, scale_factor=2.0)))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("pixels", [16, 400])
def test_attention_is_the_same_however_it_is_computed(pixels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 8, pixels, generator=generator)
    expected = torch.einsum("bhqk,bhck->bhcq", (q.mT @ k / 8**0.5).softmax(-1), v)
    torch.testing.assert_close(attend(q, k, v), expected)
    rounded = attend(*(part.bfloat16() for part in (q, k, v)))
    torch.testing.assert_close(rounded.float(), expected, rtol=0.02, atol=0.03)


def test_halving_is_the_mean_of_two_by_two_pixels() -> None:
    x = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pool(x, 4), F.avg_pool2d(x, 2))


def test_a_level_the_network_cannot_halve_often_enough_is_named() -> None:
    with pytest.raises(UserError, match=r"3 stages.*level 2 of 24 px images, which has 6 px"):
        SMALL.check_resolution(24, 2)
    SMALL.check_resolution(32, 2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_perfect_prediction_of_any_target_gives_back_the_noise(prediction_type: str, level: int) -> None:
    process = Process(Schedule.dvdp([300, 600]))
    generator = torch.Generator().manual_seed(level)
    x0 = torch.rand(4, 3, 16, 16, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(4, 3, 16 >> level, 16 >> level, generator=generator, dtype=torch.float64)
    low, high = process.schedule.span(level)
    t = torch.tensor([low + 1, low + 50, high - 20, high])
    x, wanted = example(process, prediction_type, level, t, x0, noise)  # type: ignore[arg-type]
    torch.testing.assert_close(x, process.diffuse(x0, t, noise))

    class Oracle(torch.nn.Module):
        def forward(self, *_: object) -> torch.Tensor:
            return wanted

    denoiser = NetworkDenoiser(Oracle(), process, 16, prediction_type)  # type: ignore[arg-type]
    assert (denoiser(x, t) - noise).abs().max() < 1e-5
