"""The precision that a network computes in, beside weights in fp32."""

import pytest
import torch
from torch import nn

from dvdp.config import ModelParams
from dvdp.models.compute import Computing, precision_of
from dvdp.models.unet import build_network


def network(networks: str = "shared") -> nn.Module:
    torch.manual_seed(0)
    params = ModelParams(
        model_channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_factors=(2,),
        num_classes=0,
        networks=networks,
    )
    built = build_network(params, 1)
    with torch.no_grad():
        for weight in built.parameters():
            weight.add_(0.05 * torch.randn(weight.shape))
    return built


def states(level: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(level)
    return torch.randn(3, 3, 16 >> level, 16 >> level, generator=source), torch.tensor([10, 500, 900])


def test_convolutions_and_linear_layers_compute_in_bf16_and_norms_keep_their_weights_in_fp32() -> None:
    computing = Computing(network(), "bf16")
    for module in computing.network.modules():
        for weight in module.parameters(recurse=False):
            low = isinstance(module, nn.Conv2d | nn.Linear)
            assert weight.dtype == (torch.bfloat16 if low else torch.float32), module
    assert all(weight.dtype == torch.float32 for weight in network().parameters())
    assert computing.network(*states(0), 0).dtype == torch.bfloat16


def test_in_fp32_a_network_computes_itself() -> None:
    weights = network()
    assert Computing(weights, "fp32").network is weights


def test_the_copies_take_over_what_the_weights_have_become() -> None:
    weights = network()
    computing = Computing(weights, "bf16")
    before = computing.network(*states(0), 0)
    with torch.no_grad():
        for weight in weights.parameters():
            weight.mul_(1.5)
    assert torch.equal(computing.network(*states(0), 0), before), "they are copies"
    computing.refresh()
    after = computing.network(*states(0), 0).float()
    exact = weights(*states(0), 0)
    assert (after - before.float()).norm() > 0.1 * before.float().norm()
    assert (after - exact).norm() < 0.03 * exact.norm()


def test_gradients_of_several_parts_add_up_in_fp32_to_those_of_the_weights() -> None:
    weights, exact = network(), network()
    computing = Computing(weights, "bf16")
    for level in (0, 1, 0):
        computing.network(*states(level), level).float().square().mean().backward()
        computing.collect()
        exact(*states(level), level).square().mean().backward()
    for (name, found), wanted in zip(weights.named_parameters(), exact.parameters(), strict=True):
        assert found.grad is not None
        assert wanted.grad is not None
        assert found.grad.dtype == torch.float32
        assert (found.grad - wanted.grad).norm() < 0.05 * wanted.grad.norm() + 1e-4, name
    assert all(weight.grad is None for weight in computing.network.parameters())


def test_a_network_of_another_level_gets_no_gradient() -> None:
    weights = network("per_level")
    computing = Computing(weights, "bf16")
    computing.network(*states(1), 1).float().square().mean().backward()
    computing.collect()
    moved = {name.split(".")[1] for name, weight in weights.named_parameters() if weight.grad is not None}
    assert moved == {"1"}


@pytest.mark.parametrize(("flags", "expected"), [({"amx_bf16"}, "bf16"), ({"avx2"}, "fp32")])
def test_a_model_trained_in_bf16_draws_in_it_where_the_cpu_has_units_for_it(
    flags: set[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dvdp.models.compute.cpu_instructions", lambda: flags)
    assert precision_of("bf16", torch.device("cpu")) == expected
    assert precision_of("bf16", torch.device("cuda")) == "bf16"
    assert precision_of("fp32", torch.device("cuda")) == "fp32"
