"""Benchmarks as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[2]


def run_module(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m`` in the project's folder."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=PROJECT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
