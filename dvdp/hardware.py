"""What this process may use of the machine: less than there is, in a container or a job of SLURM; and its name."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path


def cpus(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> int:
    """CPUs at a time: the least of affinity, the quotas of cgroups (whole CPUs, at least 1) and SLURM's share.

    Args:
        root: of the file system, of which ``proc`` and ``sys`` are read.
    """
    limits = [float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)]
    for folder in _groups("cpu", root):
        words = _words(folder / "cpu.max") or [
            *_words(folder / "cpu.cfs_quota_us"),
            *_words(folder / "cpu.cfs_period_us"),
        ]
        if len(words) == 2 and words[0].isdigit():  # Neither "max" nor "-1", which are no limit.
            limits.append(int(words[0]) / int(words[1]))
    share = environment.get("SLURM_CPUS_ON_NODE", "")
    return max(1, int(min([*limits, float(share)] if share.isdigit() else limits)))


def memory(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> int:
    """Bytes of memory: the least of the machine's, the limits of cgroups and SLURM's share; ``root`` as above."""
    words = _words(root / "proc/meminfo")  # MemTotal: <KiB> kB
    limits = [int(words[1]) * 1024 if words else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for folder in _groups("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limits += [int(word) for word in _words(folder / name) if word.isdigit()]
    share = environment.get("SLURM_MEM_PER_NODE", "")  # MiB; 0 is all.
    return min([*limits, int(share) * 2**20] if share.isdigit() and int(share) else limits)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that can be had now: the least of the machine's and of what the limits of cgroups leave; ``root`` as above.

    Pages of files count as free: the system takes them back when it needs them.
    """
    lines = (line.split() for line in _lines(root / "proc/meminfo"))
    known = {words[0]: int(words[1]) * 1024 for words in lines if len(words) > 1}
    left = [known.get("MemAvailable:", os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))]
    for folder in _groups("memory", root):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            most, taken = ([int(word) for word in _words(folder / name) if word.isdigit()] for name in (limit, used))
            if most and taken:
                pages = dict(line.split() for line in _lines(folder / "memory.stat"))
                left.append(most[0] - taken[0] + int(pages.get("inactive_file", 0)))
    return max(0, min(left))


def device_name(gpu: bool) -> str:
    """Of this machine's GPU, or of its processor."""
    if gpu:
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the cgroups that this process is in, of either version, up to the outermost that is seen."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            if names and controller not in names.split(","):
                continue
            for mount in dict.fromkeys((controller, names)) if names else (".", "unified"):
                # A container may see its own group as the outermost, below a path of the host that is not there.
                parts = [part for part in path.split("/") if part not in ("", "..")]
                yield from (root / "sys/fs/cgroup" / mount / Path(*parts[:i]) for i in range(len(parts), -1, -1))


def _words(file: Path) -> list[str]:
    return " ".join(_lines(file)).split()


def _lines(file: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return file.read_text().splitlines()
    return []
