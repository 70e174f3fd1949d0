"""How a network computes: its number format and its layout, for each device; no other module decides it.

The weights that are trained and averaged are in fp32. With the precision ``bf16`` another network does the forward and
the backward pass: its convolutions and linear layers are copies in bf16, made once a step and not once a call as
autocast makes them.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dvdp.config import Precision
from dvdp.precision import BF16_INSTRUCTIONS, cpu_instructions


def arrange(network: nn.Module, device: torch.device) -> nn.Module:
    """Bring a network to a device, in the layout that its convolutions are fastest in.

    On a GPU that is channels last: cuDNN would transpose activations before and after its kernels otherwise. On a CPU
    torch's own layout is faster in training, see docs/performance.md. From then on this process lets cuDNN try its
    kernels for each size, and computes products in fp32 as TF32, as cuDNN does convolutions.
    """
    network = network.to(device)
    if device.type != "cuda":
        return network
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    return network.to(memory_format=torch.channels_last)


def precision_of(trained: Precision, device: torch.device) -> Precision:
    """In which a trained network draws: as it was trained, or more exactly on a CPU that is slow in bf16."""
    slow = device.type == "cpu" and not cpu_instructions() & BF16_INSTRUCTIONS
    return "fp32" if slow else trained


class Computing:
    """Forward and backward passes in a precision of a network with fp32 weights.

    Args:
        weights: the network that has them, on its device.
    """

    def __init__(self, weights: nn.Module, precision: Precision) -> None:
        # All of them, so that the gradients of a step's parts are added in a few kernels.
        self._weights: list[Tensor] = [*weights.parameters()] if precision == "bf16" else []
        low = {id(weight) for weight in lowered(weights)}
        self.copies: list[Tensor] = [
            nn.Parameter(w.detach().bfloat16() if id(w) in low else w.detach().clone(), requires_grad=w.requires_grad)
            for w in self._weights
        ]
        """In the place of the weights, in the order of its parameters; none with ``fp32``."""
        self._network = weights
        # A deep copy takes what its memo names instead of copying it.
        memo = {id(weight): made for weight, made in zip(self._weights, self.copies, strict=True)}
        self.network: nn.Module = copy.deepcopy(weights, memo) if self._weights else weights
        """The one to call; with ``fp32``, the network of the weights itself."""

    def zero_grad(self) -> None:
        """Drop the gradients of the weights and of their copies."""
        self._network.zero_grad()
        self.network.zero_grad()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over what the fp32 weights have become."""
        if self._weights:
            torch._foreach_copy_([*self.copies], self._weights)

    @torch.no_grad()
    def collect(self) -> None:
        """Add the gradients of the copies to those of the fp32 weights, and drop them."""
        pairs = zip(self._weights, self.copies, strict=True)
        found = [(weight, made, made.grad) for weight, made in pairs if made.grad is not None]
        if not found:
            return
        in_fp32 = [torch.empty_like(grad, dtype=torch.float32) for _, _, grad in found]
        torch._foreach_copy_(in_fp32, [grad for _, _, grad in found])
        sums = [(w.grad, new) for (w, _, _), new in zip(found, in_fp32, strict=True) if w.grad is not None]
        if sums:
            torch._foreach_add_([total for total, _ in sums], [new for _, new in sums])
        for (weight, made, _), new in zip(found, in_fp32, strict=True):
            made.grad = None
            weight.grad = new if weight.grad is None else weight.grad


def lowered(network: nn.Module) -> list[Tensor]:
    """The weights that bf16 is for: those of convolutions and linear layers."""
    layers = (module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    return [parameter for layer in layers for parameter in layer.parameters(recurse=False)]
