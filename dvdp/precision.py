"""The number format that a machine trains fastest in."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

#: Names of a CPU's instructions for bf16, alike in Linux and in torch: of Intel, of Intel and AMD, of ARM.
BF16_INSTRUCTIONS = {"amx_bf16", "avx512_bf16", "bf16"}


def cpu_instructions(listed: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What the first CPU can do, by Linux, which takes no import and knows what it lets programs use, or by torch."""
    if listed.exists():
        lines = (line.partition(":") for line in listed.read_text().splitlines())
        return next((set(words.split()) for name, _, words in lines if name.strip() in ("flags", "Features")), set())
    import torch

    # Of torch since 2.13.
    ask = getattr(torch.cpu, "get_capabilities", dict)
    return {name for name, has in ask().items() if has is True}


def fastest_precision(gpu: bool) -> Literal["fp32", "bf16"]:
    """bf16 on a GPU and on a CPU with instructions for it; on another CPU it takes more than twice as long as fp32."""
    return "bf16" if gpu or cpu_instructions() & BF16_INSTRUCTIONS else "fp32"
