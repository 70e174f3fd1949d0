"""How the benchmarks measure: in turns, beside the machine's own peak, with the memory a piece of work takes."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch.nn.functional import conv2d
from tqdm import tqdm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Found = TypeVar("Found")


def in_turns(
    works: Sequence[Callable[[], Found]], turns: int, title: str, warm_up: int = 1
) -> Iterator[tuple[Found, ...]]:
    """What each found, turn by turn; turns, so that a busy machine slows all alike."""
    with tqdm(total=len(works) * (turns + warm_up), desc=title, leave=False, disable=None) as bar:
        for turn in range(turns + warm_up):
            found = []
            for work in works:
                found.append(work())
                bar.update()
            if turn >= warm_up:
                yield tuple(found)


def take_turns(
    works: Sequence[Callable[[], object]], turns: int, device: torch.device, title: str, warm_up: int = 1
) -> list[float]:
    """Median seconds of each; see :func:`in_turns`."""
    timed = [partial(seconds, work, device) for work in works]
    return [statistics.median(times) for times in zip(*in_turns(timed, turns, title, warm_up), strict=True)]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """That a piece of work takes."""
    start = clock(device)
    work()
    return clock(device) - start


def clock(device: torch.device) -> float:
    """Seconds, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_tflops(precision: str, device: torch.device) -> dict[str, float]:
    """TFLOP/s of a large matrix product and of a 3x3 convolution of many channels, the best of a few.

    On a CPU a convolution can be the faster one: its kernels come from another library.
    """
    gpu, dtype = device.type == "cuda", DTYPES[precision]
    size, channels, batch, side = (8192, 512, 64, 64) if gpu else (2048, 256, 4, 32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(batch, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    works: dict[str, tuple[Callable[[], object], float]] = {
        "matmul": (lambda: a @ b, 2 * size**3),
        "convolution": (lambda: conv2d(x, weight, padding=1), 2 * 9 * channels**2 * batch * side**2),
    }
    found = {}
    with torch.no_grad():
        for name, (work, flops) in works.items():
            found[name] = flops / min(seconds(work, device) for _ in range(6)) / 1e12
    return found


def peak_memory(work: Callable[[], None], device: torch.device) -> int:
    """Bytes that a piece of work takes at most, beyond what was held before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # What earlier work freed is kept by the allocator, and would hide what this work takes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024
