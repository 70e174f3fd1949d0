"""What moves the weights: AdamW, or Muon for the matrices among them and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dvdp.config import TrainingParams

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


class Muon(torch.optim.Muon):
    """Muon (Jordan et al. 2024) over weights (outputs, ...), each taken as the matrix of its outputs.

    A step is scaled to the size that AdamW's would have, so that a learning rate means the same for both (Liu et al.
    2025, *Muon is scalable for LLM training*, eq. 4).
    """

    def __init__(self, weights: Sequence[Tensor], lr: float, weight_decay: float) -> None:
        self._weights = list(weights)
        # Each shares the memory of its weight: torch's takes nothing but matrices.
        matrices = [nn.Parameter(weight.detach().view(len(weight), -1)) for weight in weights]
        super().__init__(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step from the gradients of the weights."""
        for matrix, weight in zip(self.param_groups[0]["params"], self._weights, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.view(matrix.shape)
        super().step(closure)
        self.zero_grad()  # They would keep the memory of the gradients until the next step.


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
        state: dict[int, dict[str, Tensor]] = {}
        start = f"optimizer.{place}."
        for name, tensor in packed.items():
            if name.startswith(start):
                index, key = name.removeprefix(start).split(".")
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
