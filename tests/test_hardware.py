"""Hardware is what this process may use, in containers and in jobs of SLURM."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from dvdp.hardware import cpus, free_memory, memory

PROJECT = Path(__file__).parents[1]
GIB = 2**30
MANY = len(os.sched_getaffinity(0))


def machine(root: Path, files: Mapping[str, str]) -> Path:
    """A root folder of a machine of 64 GiB with these files."""
    for name, text in {"proc/meminfo": f"MemTotal: {64 * 2**20} kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = {"proc/self/cgroup": "0::/job/task\n"}
V1 = {"proc/self/cgroup": "4:memory:/job/task\n2:cpu,cpuacct:/job/task\n1:name=systemd:/\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (MANY, 64)),
        (V2, (MANY, 64)),
        (
            {**V2, "sys/fs/cgroup/job/task/cpu.max": "max 100000", "sys/fs/cgroup/job/task/memory.max": "max"},
            (MANY, 64),
        ),
        (
            {
                **V2,
                "sys/fs/cgroup/job/task/cpu.max": "max 100000",
                "sys/fs/cgroup/job/cpu.max": "150000 100000",
                "sys/fs/cgroup/job/task/memory.max": str(8 * GIB),
                "sys/fs/cgroup/job/memory.max": str(4 * GIB),
            },
            (1, 4),
        ),
        # Half a CPU is one; a container sees its own group as the outermost.
        ({**V2, "sys/fs/cgroup/cpu.max": "50000 100000", "sys/fs/cgroup/memory.max": str(2 * GIB)}, (1, 2)),
        (
            {
                **V1,
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "100000",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(3 * GIB),
                "sys/fs/cgroup/memory/job/task/memory.limit_in_bytes": "9223372036854771712",
            },
            (1, 3),
        ),
        (
            {
                **V1,
                "sys/fs/cgroup/cpu/job/task/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/job/task/cpu.cfs_period_us": "100000",
            },
            (MANY, 64),
        ),
        # Of another group, and of one outside this process's view.
        ({**V2, "sys/fs/cgroup/other/cpu.max": "1000 100000", "sys/fs/cgroup/other/memory.max": "1"}, (MANY, 64)),
        ({"proc/self/cgroup": "0::/../../job\n", "sys/fs/cgroup/memory.max": str(GIB)}, (MANY, 1)),
    ],
)
def test_the_least_limit_of_all_groups_counts(
    files: Mapping[str, str], expected: tuple[int, int], tmp_path: Path
) -> None:
    root = machine(tmp_path, files)
    assert (cpus(root, {}), memory(root, {}) // GIB) == expected


def test_slurm_has_a_say(tmp_path: Path) -> None:
    root = machine(tmp_path, {})
    assert cpus(root, {"SLURM_CPUS_ON_NODE": "1"}) == 1
    assert cpus(root, {"SLURM_CPUS_ON_NODE": "10000"}) == MANY
    assert memory(root, {"SLURM_MEM_PER_NODE": "2048"}) == 2 * GIB
    assert memory(root, {"SLURM_MEM_PER_NODE": "0"}) == 64 * GIB


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 20),
        # Of 8 GiB 6 are taken, 3 of them by pages of files that the system takes back.
        (
            {
                **V2,
                "sys/fs/cgroup/job/task/memory.max": str(8 * GIB),
                "sys/fs/cgroup/job/task/memory.current": str(6 * GIB),
                "sys/fs/cgroup/job/task/memory.stat": f"anon 5\ninactive_file {3 * GIB}\n",
            },
            5,
        ),
        (
            {
                **V1,
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(3 * GIB),
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": str(2 * GIB),
            },
            1,
        ),
        ({**V2, "sys/fs/cgroup/job/memory.max": "max", "sys/fs/cgroup/job/memory.current": str(6 * GIB)}, 20),
    ],
)
def test_free_memory_is_what_the_machine_and_the_limits_leave(tmp_path: Path, files: dict[str, str], free: int) -> None:
    said = {"proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemAvailable: {20 * 2**20} kB\n"}
    assert free_memory(machine(tmp_path, {**files, **said})) == free * GIB


def test_affinity_counts() -> None:
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); from dvdp.hardware import *; print(cpus())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_limits_of_a_real_group_count() -> None:
    base = Path("/sys/fs/cgroup")
    two = (base / "cgroup.controllers").exists()
    name = f"dvdp-test-{os.getpid()}"
    groups = [base / name] if two else [base / "cpu" / name, base / "memory" / name]
    limits = (
        {groups[0] / "cpu.max": "100000 100000", groups[0] / "memory.max": str(3 * GIB)}
        if two
        else {groups[0] / "cpu.cfs_quota_us": "100000", groups[1] / "memory.limit_in_bytes": str(3 * GIB)}
    )
    try:
        for group in groups:
            group.mkdir()
        for file, text in limits.items():
            file.write_text(text)
        enter = "".join(f"echo $$ > {group}/cgroup.procs; " for group in groups)
        code = "from dvdp.hardware import cpus, memory; print(cpus(), memory() // 2**30)"
        line = ["sh", "-ec", f'{enter} exec "$0" -c "$1"', sys.executable, code]
        done = subprocess.run(line, cwd=PROJECT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no group can be made here: {error}")
    finally:
        for group in groups:
            if group.exists():
                group.rmdir()
    assert done.stdout == "1 3\n"
