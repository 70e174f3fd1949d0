"""What a measurement was made on, to stand beside its numbers."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from dvdp.hardware import cpus


def machine() -> dict[str, str | int]:
    """Hardware, versions, commit (``DVDP_COMMIT`` where the files came without git) and command."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": cpus(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "cudnn": torch.backends.cudnn.version() or 0,
        "python": platform.python_version(),
        "malloc": os.environ.get("MALLOC_MMAP_THRESHOLD_", "default"),
        "commit": os.environ.get("DVDP_COMMIT") or _commit(),
        "command": " ".join(["python", "-m", _module(), *map(_anywhere, sys.argv[1:])]),
    }


def _anywhere(argument: str) -> str:
    """An argument without folders of this machine."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git, as on a machine that was handed the bare files
        return "unknown"
    return done.stdout.strip() or "unknown"


def _module() -> str:
    script, root = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parents[1]
    return ".".join(script.relative_to(root).with_suffix("").parts) if script.is_relative_to(root) else script.stem
