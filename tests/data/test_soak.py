"""A long data set takes no more memory than a short one: to prepare, to verify and to load."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

LONG, SHORT, SIDE = 200_000, 20_000, 32

RUN = f"""
import sys
from pathlib import Path

import numpy as np

from dvdp.config import DatasetParams
from dvdp.data.loading import training_batches
from dvdp.data.prepare import prepare
from dvdp.data.sources import SOURCES, Item
from dvdp.data.store import ImageStore
from dvdp.data.verify import verify

NOISE = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8)


class Synthetic:
    needs, labels = None, ("even", "odd")

    def __init__(self, path):
        self.count = int(sys.argv[1])

    def __iter__(self):
        for i in range(self.count):
            pixels = NOISE[7 * i % 900_000 :][: 3 * {SIDE}**2].reshape({SIDE}, {SIDE}, 3)
            yield Item(f"{{i:08d}}", self.labels[i % 2], pixels.copy)


SOURCES["synthetic"] = Synthetic
out = Path(sys.argv[2])
print("prepare", flush=True)
prepare(DatasetParams(source="synthetic", resolution={SIDE}, shard_gib=0.1, deduplicate=True), out)
print("verify", flush=True)
verify(out, workers=1)
print("load", flush=True)
store = ImageStore(out)
batches = training_batches(store, batch=256, seed=0)
for _ in range(len(store) // 256):
    next(batches)
print("done", flush=True)
"""


def peaks(count: int, out: Path) -> dict[str, tuple[float, float]]:
    """Of each phase: the most memory of its own, in MiB, over all its processes, and its seconds.

    Pages of the store that the system caches, and takes back when it needs them, are not counted.
    """
    log = out.with_suffix(".txt")
    found: dict[str, tuple[float, float]] = {}
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-c", RUN, str(count), str(out)], stdout=file)
        begun: dict[str, float] = {}
        while process.poll() is None:
            phase = (log.read_text().split() or ["start"])[-1]
            begun.setdefault(phase, time.monotonic())
            most = max(found.get(phase, (0.0, 0.0))[0], memory(process.pid))
            found[phase] = (most, time.monotonic() - begun[phase])
            time.sleep(0.05)
    assert process.returncode == 0
    assert log.read_text().split()[-1] == "done"
    return found


def memory(pid: int) -> float:
    total = 0.0
    try:
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            status = Path(f"/proc/{process.pid}/status").read_text()
            total += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1024
    except (psutil.NoSuchProcess, OSError):
        return 0.0
    return total


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to measure memory")
def test_memory_is_flat_from_prepare_to_load(tmp_path: Path) -> None:
    short, long = (peaks(count, tmp_path / str(count)) for count in (SHORT, LONG))
    for phase in ("prepare", "verify", "load"):
        (before, _), (after, seconds) = short[phase], long[phase]
        print(f"{phase}: {before:.0f} MiB for {SHORT:,} images, {after:.0f} MiB for {LONG:,} ({seconds:.0f} s)")
    for phase in ("prepare", "verify", "load"):
        assert long[phase][0] < short[phase][0] + 40, phase
