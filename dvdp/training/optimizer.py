"""What moves the weights: AdamW, or Muon for the matrices among them and AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dvdp.config import TrainingParams
from dvdp.training.ranks import share_like, whole

#: Layers next to the pixels, which Muon is not for.
_ENDS = {"stem", "head"}


def build_optimizers(network: nn.Module, params: TrainingParams) -> list[torch.optim.Optimizer]:
    """The optimisers of a network's parameters, each of which is in one of them.

    With ``optimizer`` "muon" the weights of its linear layers and convolutions, but for the first and the last, go to
    :class:`Muon`. Both take the same learning rate and weight decay.
    """
    muon = matrices(network) if params.optimizer == "muon" else []
    taken = {id(weight) for weight in muon}
    rest = [parameter for parameter in network.parameters() if id(parameter) not in taken]
    rate, decay = params.learning_rate, params.weight_decay
    adamw = torch.optim.AdamW(rest, lr=rate, weight_decay=decay, fused=True)
    return [adamw, Muon(muon, rate, decay)] if muon else [adamw]


def matrices(network: nn.Module) -> list[Tensor]:
    """The weights that Muon is for."""
    return [
        module.weight
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not _ENDS & set(name.split("."))
    ]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) over weights (outputs, ...), each taken as the matrix of its outputs.

    A step is scaled to the size that AdamW's would have, so that a learning rate means the same for both (Liu et al.
    2025, *Muon is scalable for LLM training*, eq. 4). It makes the steps of ``torch.optim.Muon``, which takes matrices
    one by one, in some 4,000 kernels for a UNet of 256 px; here those of one size are multiplied in one call.
    """

    def __init__(self, weights: Sequence[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay})
        self._alike: dict[torch.Size, list[Tensor]] = {}
        for weight in weights:
            self._alike.setdefault(weight.shape, []).append(weight)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step from the gradients of the weights."""
        rate, decay = self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        for shape, alike in self._alike.items():
            moved = [(weight, weight.grad) for weight in alike if weight.grad is not None]
            if not moved:
                continue
            weights, gradients = [weight for weight, _ in moved], [gradient for _, gradient in moved]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            averages = [self.state[weight]["momentum_buffer"] for weight in weights]
            torch._foreach_lerp_(averages, gradients, 1 - MOMENTUM)
            # Nesterov's: the average as another step with this gradient would make it.
            updates = torch.stack([whole(update) for update in torch._foreach_lerp(gradients, averages, MOMENTUM)])
            updates = orthogonal(updates.flatten(2)).to(updates.dtype).view(updates.shape)
            torch._foreach_mul_(weights, 1 - rate * decay)
            scale = 0.2 * math.sqrt(max(len(weights[0]), shape[1:].numel()))
            shares = [share_like(update, weight) for update, weight in zip(updates, weights, strict=True)]
            torch._foreach_add_(weights, shares, alpha=-rate * scale)


#: As those of ``torch.optim.Muon``: of the average of gradients; of the iteration that makes matrices orthogonal.
MOMENTUM = 0.95
COEFFICIENTS, ITERATIONS, EPSILON = (3.4445, -4.775, 2.0315), 5, 1e-7


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (n, rows, columns) with their singular values brought to about 1, in bf16 (Jordan et al. 2024)."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def pack_optimizers(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The state of optimisers as named tensors, for a checkpoint."""
    return {
        f"optimizer.{place}.{i}.{key}": value
        for place, optimizer in enumerate(optimizers)
        for i, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }


def unpack_optimizers(optimizers: Sequence[torch.optim.Optimizer], packed: Mapping[str, Tensor]) -> None:
    """The inverse of :func:`pack_optimizers`; learning rate and the like stay as they are."""
    for place, optimizer in enumerate(optimizers):
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        start = f"optimizer.{place}."
        for name, tensor in packed.items():
            if name.startswith(start):
                index, key = name.removeprefix(start).split(".")
                weight = weights[int(index)]
                if tensor.shape == weight.shape:
                    # Fused kernels want the weight's layout, which a file does not have.
                    tensor = torch.empty_like(weight, requires_grad=False).copy_(share_like(tensor, weight))
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
