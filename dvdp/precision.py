"""The number format that a machine trains fastest in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

#: Names that torch gives a CPU's instructions for bf16: of Intel, of Intel and AMD, of ARM.
BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")


def cpu_capabilities() -> Mapping[str, Any]:
    """This CPU's instructions by torch's names; only those for bf16 where torch is too old to list them all."""
    import torch

    if ask := getattr(torch.cpu, "get_capabilities", None):
        return ask()
    return {"avx512_bf16": torch.cpu._is_avx512_bf16_supported()}


def fastest_precision(gpu: bool) -> Literal["fp32", "bf16"]:
    """bf16 on a GPU and on a CPU with instructions for it; on another CPU it takes more than twice as long as fp32."""
    if gpu:
        return "bf16"
    capabilities = cpu_capabilities()
    return "bf16" if any(capabilities.get(name) for name in BF16_INSTRUCTIONS) else "fp32"
