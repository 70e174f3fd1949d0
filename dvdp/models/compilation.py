"""The network by torch.compile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from dvdp.errors import UserError

#: Shapes that a network may be compiled for: each level's, with each number of images that a step has of it.
SHAPES = 64


def compile_network(*modules: nn.Module) -> None:
    """Have torch.compile make each shape that the network is given its own code, when it first comes.

    The state dict stays as it is; a copy of the network is not compiled.

    Args:
        modules: the network, or parts of it that are compiled by themselves.
    """
    import torch._dynamo

    limit = SHAPES * len(modules)
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.accumulated_recompile_limit = max(limit, torch._dynamo.config.accumulated_recompile_limit)
    for module in modules:
        module.compile(dynamic=False)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Within it, a compilation that fails raises UserError."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"training.compile: found true, but torch.compile fails here ({reason.strip()}), expected a compiler it can"
            " use (g++ on a CPU, Triton on a GPU); install it, or set it to false."
        ) from error
