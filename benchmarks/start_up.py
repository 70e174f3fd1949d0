"""Processor seconds of commands that have little to do: what their imports cost.

    python -m benchmarks.start_up

Each command runs in a folder of its own with the default params, prepare on ten images. Prints the least of a few runs,
user and system time together, beside that of ``import torch``.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

PARAMS = Path(__file__).parents[1] / "params.yaml"
FOLDER = ["-S", "dataset.source=image_folder", "-S", "dataset.path=images", "-S", "dataset.name=ten"]
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "dvdp --help": ["-m", "pipelines.cli", "--help"],
    "dvdp params": ["-m", "pipelines.cli", "params"],
    "dvdp check": ["-m", "pipelines.cli", "check"],
    "dvdp prepare": ["-m", "pipelines.cli", "prepare", *FOLDER],
}


def main() -> None:
    """Print a line for each command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="of each command")
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(PARAMS, folder)
        (folder / "images").mkdir()
        for i in range(10):
            Image.linear_gradient("L").rotate(36 * i).save(folder / "images" / f"{i}.png")
        for command, arguments in COMMANDS.items():
            print(f"{command:<13} {min(_seconds(arguments, folder) for _ in range(runs)):.2f} s")


def _seconds(arguments: list[str], folder: Path) -> float:
    shutil.rmtree(folder / "data", ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=folder, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
