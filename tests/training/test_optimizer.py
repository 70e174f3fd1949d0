"""Which optimiser moves which weight, and how far."""

import math

import pytest
import torch
from torch import nn

from dvdp.config import ModelParams, TrainingParams
from dvdp.models.unet import build_network
from dvdp.training.optimizer import Muon, build_optimizers, pack_optimizers, unpack_optimizers


def network(networks: str = "shared") -> nn.Module:
    torch.manual_seed(0)
    return build_network(
        ModelParams(
            model_channels=8,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_factors=(2,),
            networks=networks,
            num_classes=0,
        ),
        2,
    )


def storages(optimizer: torch.optim.Optimizer) -> set[int]:
    return {parameter.data_ptr() for parameter in optimizer.param_groups[0]["params"]}


def test_adamw_takes_every_parameter() -> None:
    net = network()
    (adamw,) = build_optimizers(net, TrainingParams(optimizer="adamw"))
    assert storages(adamw) == {parameter.data_ptr() for parameter in net.parameters()}


@pytest.mark.parametrize("networks", ["shared", "per_level"])
def test_muon_takes_the_matrices_between_the_first_layer_and_the_last(networks: str) -> None:
    net = network(networks)
    adamw, muon = build_optimizers(net, TrainingParams(optimizer="muon"))
    inner = {
        parameter.data_ptr()
        for name, parameter in net.named_parameters()
        if parameter.ndim >= 2 and not any(part in name for part in ("stem", "head", "level."))
    }
    assert storages(muon) == inner
    assert storages(adamw) == {parameter.data_ptr() for parameter in net.parameters()} - inner


def test_a_muon_step_turns_a_convolution_by_an_orthogonal_matrix_of_adamws_size() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(16, 4, 3, 3))
    before = weight.detach().clone()
    muon = Muon([weight], lr=0.1, weight_decay=0.0)
    weight.grad = torch.randn(16, 4, 3, 3)
    muon.step()
    step = (weight.detach() - before).view(16, -1)
    singular = torch.linalg.svdvals(step) / (0.1 * 0.2 * math.sqrt(36))
    assert singular.sub(1).abs().max() < 0.5, "five rounds of Newton and Schulz come this near to 1"
    assert (step * weight.grad.view(16, -1)).sum() < 0


def test_a_weight_without_a_gradient_stays() -> None:
    weights = [nn.Parameter(torch.randn(4, 4)) for _ in range(2)]
    before = [weight.detach().clone() for weight in weights]
    muon = Muon(weights, lr=0.1, weight_decay=0.0)
    weights[0].grad = torch.ones(4, 4)
    muon.step()
    weights[0].grad = None
    moved = weights[0].detach().clone()
    muon.step()
    assert not torch.equal(moved, before[0])
    assert torch.equal(weights[0], moved)
    assert torch.equal(weights[1], before[1])


def test_the_state_of_both_optimisers_goes_through_a_checkpoint() -> None:
    net, other = network(), network()
    params = TrainingParams(optimizer="muon")
    optimizers, others = build_optimizers(net, params), build_optimizers(other, params)

    def step(which: nn.Module, by: list[torch.optim.Optimizer], seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in which.parameters():
            parameter.grad = torch.randn(parameter.shape)
        for optimizer in by:
            optimizer.step()

    step(net, optimizers, 1)
    other.load_state_dict(net.state_dict())
    unpack_optimizers(others, {name: state.clone() for name, state in pack_optimizers(optimizers).items()})
    step(net, optimizers, 2)
    step(other, others, 2)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_matrices_multiplied_together_move_as_torch_moves_them_one_by_one(layout: torch.memory_format) -> None:
    shapes = [(16, 8, 3, 3), (16, 8, 3, 3), (8, 32, 1, 1), (24, 12), (24, 12), (24, 12), (4, 4)]
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    apart = [nn.Parameter(weight.detach().clone().flatten(1)) for weight in weights]
    for weight in weights:
        if weight.ndim == 4:
            weight.data = weight.data.contiguous(memory_format=layout)
    muon = Muon(weights, lr=1e-3, weight_decay=0.1)
    theirs = torch.optim.Muon(apart, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for weight, matrix in zip(weights, apart, strict=True):
            weight.grad = torch.randn(weight.shape).to(
                memory_format=layout if weight.ndim == 4 else torch.preserve_format
            )
            matrix.grad = weight.grad.flatten(1).clone()
        muon.step()
        theirs.step()
    for weight, matrix in zip(weights, apart, strict=True):
        # bf16 products may be rounded another way in another order.
        torch.testing.assert_close(weight.flatten(1), matrix, atol=1e-6, rtol=0)
