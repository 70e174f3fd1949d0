"""What is told to end ends, whether it wants to or not."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from pipelines.left_behind import end_processes

CHILD = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True); input()"


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_process_and_its_children_end(stubborn: bool) -> None:
    script = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {CHILD}" if stubborn else CHILD
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    started = subprocess.Popen([sys.executable, "-c", script], text=True, **pipes)  # type: ignore[call-overload]
    child = psutil.Process(int(started.stdout.readline()))
    end_processes([psutil.Process(started.pid), child], patience=0.5)
    assert not psutil.pid_exists(started.pid)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
