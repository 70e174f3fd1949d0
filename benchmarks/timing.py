"""How the benchmarks measure: in turns, beside the machine's own peak, with the memory a piece of work takes."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
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


def times_in_turns(
    works: Sequence[Callable[[], object]], turns: int, device: torch.device, title: str, warm_up: int = 1
) -> list[tuple[float, ...]]:
    """Seconds of each, turn by turn; see :func:`in_turns`."""
    return list(in_turns([partial(seconds, work, device) for work in works], turns, title, warm_up))


def take_turns(
    works: Sequence[Callable[[], object]], turns: int, device: torch.device, title: str, warm_up: int = 1
) -> list[float]:
    """Median seconds of each; see :func:`in_turns`."""
    return [
        statistics.median(times) for times in zip(*times_in_turns(works, turns, device, title, warm_up), strict=True)
    ]


def spreads(turns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """How far what single turns found lies apart, by name: half the distance between the quartiles, over the median."""
    found = {}
    for name in turns[0]:
        low, median, high = np.percentile([turn[name] for turn in turns], [25, 50, 75])
        found[name] = float((high - low) / 2 / median)
    return found


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """That a piece of work takes; of :func:`busy_clock`."""
    start = busy_clock(device)
    work()
    return busy_clock(device) - start


def busy_clock(device: torch.device) -> float:
    """Seconds; on a CPU, which other work may keep busy, of processor time of each thread."""
    return clock(device) if device.type == "cuda" else time.process_time() / torch.get_num_threads()


def clock(device: torch.device) -> float:
    """Seconds, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def warn_of_allocator(device: torch.device) -> None:
    """Say so where a CPU is measured with an allocator that gives large blocks back."""
    if device.type == "cpu" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        print(
            "MALLOC_MMAP_THRESHOLD_: found nothing in the environment, expected 1073741824, and 8589934592 in"
            " MALLOC_TRIM_THRESHOLD_, without which ratios look better than they are; set both, as the Makefile does.",
            file=sys.stderr,
        )


def peak_tflops(precision: str, device: torch.device) -> dict[str, float]:
    """TFLOP/s of a large matrix product and of a 3x3 convolution of many channels, the best of a few.

    On a CPU a convolution can be the faster one: its kernels come from another library.
    """
    gpu, dtype = device.type == "cuda", DTYPES[precision]
    size, channels, batch, resolution = (8192, 512, 64, 64) if gpu else (2048, 256, 4, 32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(batch, channels, resolution, resolution, device=device, dtype=dtype).to(
        memory_format=torch.channels_last
    )
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    works: dict[str, tuple[Callable[[], object], float]] = {
        "matmul": (lambda: a @ b, 2 * size**3),
        "convolution": (lambda: conv2d(x, weight, padding=1), 2 * 9 * channels**2 * batch * resolution**2),
    }
    found = {}
    with torch.no_grad():
        for name, (work, flops) in works.items():
            found[name] = flops / min(seconds(work, device) for _ in range(6)) / 1e12
    return found


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
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
