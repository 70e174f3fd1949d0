"""The whole pipeline where little is as it is on a developer's machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.support import LIMIT, Project

#: Nothing listens there.
DEAD_PROXY = "http://127.0.0.1:9"


@contextlib.contextmanager
def limited(cpus: float, memory: int) -> Iterator[list[Path]]:
    """Control groups with these limits, as a container's: a process that writes 0 to their files is in them."""
    name, roots = f"dvdp-{uuid.uuid4().hex[:8]}", Path("/sys/fs/cgroup")
    unified = (roots / "cgroup.controllers").exists()
    groups = [roots / name] if unified else [roots / "cpu" / name, roots / "memory" / name]
    try:
        for group in groups:
            group.mkdir()
        if unified:
            (groups[0] / "cpu.max").write_text(f"{round(cpus * 100_000)} 100000")
            (groups[0] / "memory.max").write_text(str(memory))
        else:
            (groups[0] / "cpu.cfs_period_us").write_text("100000")
            (groups[0] / "cpu.cfs_quota_us").write_text(str(round(cpus * 100_000)))
            (groups[1] / "memory.limit_in_bytes").write_text(str(memory))
    except OSError as error:
        pytest.skip(f"control groups with limits cannot be made here: {error}")
    try:
        yield [group / "cgroup.procs" for group in groups]
    finally:
        for group in groups:
            with contextlib.suppress(OSError):
                group.rmdir()


@pytest.mark.soak
@pytest.mark.timeout(2 * LIMIT)
def test_the_demo_runs_in_a_container_behind_a_dead_proxy_with_a_long_temporary_folder_and_no_home(
    prepared: Project, tmp_path: Path
) -> None:
    here = prepared.copy(tmp_path / "a folder of Zoë's, 雪", training={"images": 800}, settings={
        "dvdp-600": {"process": "dvdp", "turning_points": [600]},
    })  # fmt: skip
    temporary = tmp_path / ("t" * 100) / ("t" * 100)
    temporary.mkdir(parents=True)
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"), DEAD_PROXY)
    environment = here.environment(**proxies, TMPDIR=str(temporary))
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "NO_PROXY", "no_proxy", "LANG", "LC_ALL", "USER"):
        environment.pop(name, None)
    with limited(cpus=1, memory=4 << 30) as groups:

        def enter() -> None:
            for group in groups:
                group.write_text("0")
            os.close(1)

        with (here.folder / "errors.txt").open("wb") as errors:
            done = subprocess.run(
                ["dvdp", "experiment", "--reports", "reports"],
                cwd=here.folder, env=environment, preexec_fn=enter, stderr=errors, timeout=2 * LIMIT, check=False,
            )  # fmt: skip
    said = (here.folder / "errors.txt").read_text()
    assert done.returncode == 0, said[-6000:]
    assert "Traceback" not in said
    assert "dvdp-600" in (here.folder / "reports" / "table.md").read_text()
