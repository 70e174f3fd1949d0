"""What training will take: said before its first step, and compared with what it took afterwards."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

#: Steps that are timed, after one that is not.
STEPS = 3


@dataclass(frozen=True)
class Estimate:
    """What training a run will take."""

    images: int
    flops: float
    """Of all passes, forward and backward (three times the forward)."""
    seconds: float
    """At the pace of the first steps."""
    memory_bytes: int
    """Peak of one worker; see :func:`dvdp.training.memory.worker_memory`."""
    disk_bytes: int = 0
    """See :func:`dvdp.training.memory.run_bytes`."""

    def sentence(self) -> str:
        """For people."""
        minutes, seconds = divmod(round(self.seconds), 60)
        return (
            f"{self.images:,} images, {self.flops:.2e} FLOPs, about {minutes} min {seconds:02d} s,"
            f" {self.memory_bytes / 2**30:.1f} GiB a worker, {self.disk_bytes / 2**30:.2f} GiB on disk"
        )


def median_seconds(step: Callable[[], object], device: torch.device) -> float:
    """Of a few calls, after one that is not timed."""
    times = []
    for _ in range(1 + STEPS):
        start = clock(device)
        step()
        times.append(clock(device) - start)
    return statistics.median(times[1:])


def clock(device: torch.device) -> float:
    """Seconds, once the device has done all it was given.

    With one CPU thread it is the processor's time, which other work on the machine does not lengthen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def peak_memory(device: torch.device) -> int:
    """Most memory this process has held so far, in bytes: on its GPU, else in RAM.

    Of RAM it is the process's own, where Linux says so: pages of files that it maps, of libraries and of the data set,
    are shared by all workers, and the system takes them back when it needs them.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        kib = {
            name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if "kB" in value
        }
        return 1024 * max(kib["VmHWM"] - kib["RssFile"], kib["RssAnon"])
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
