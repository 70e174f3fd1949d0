"""SIGKILL while a checkpoint is written: half a file is never taken for a whole one, and nothing else is lost."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dvdp.training import checkpoints

SCRIPT = """
import sys
from pathlib import Path
import numpy as np, torch
from dvdp.config import parse_params
from dvdp.data.loading import ArrayImages
from dvdp.training.loop import train

torch.set_num_threads(1)
(run,) = parse_params({
    "dataset": {"resolution": 8},
    "settings": {"wide": {"process": "dvdp", "turning_points": [500]}},
    # Few pixels and many weights: a checkpoint takes longer than a step.
    "model": {
        "model_channels": 192, "channel_mult": [1], "attention_factors": [1], "num_head_channels": 64, "num_classes": 0,
    },
    "training": {"images": 64, "budget": "images", "batch": 4, "warmup_images": 0, "checkpoint_images": 4,
                 "keep_checkpoints": 2, "preview_images": 0, "optimizer": "adamw", "precision": "fp32"},
    "sampling": {"steps": 4},
}).runs()
pictures = np.random.default_rng(0).integers(0, 256, (16, 3, 8, 8), dtype=np.uint8)
train(run, ArrayImages(pictures), Path(sys.argv[1]), "abc")
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)])


@pytest.mark.slow
def test_a_run_killed_while_it_writes_a_checkpoint_ends_with_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    folder, caught = tmp_path / "killed" / "checkpoints", []
    # Which moment a kill meets is chance: go on until two have met a file that was being written.
    for _ in range(12):
        process = start(folder.parent)
        try:
            known = {path.name for path in folder.glob("*")}
            while process.poll() is None:
                new = {path.name for path in folder.glob("*")} - known
                # After a whole checkpoint of its own, so that every attempt gets on.
                if any(not name.startswith(".") for name in new) and (parts := list(folder.glob(".*.part"))):
                    with contextlib.suppress(FileNotFoundError):
                        if parts[0].stat().st_size:
                            break
                time.sleep(0.001)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        stranded = [path for path in folder.glob(".*.part") if path.stat().st_size]
        newest = checkpoints.find(folder)[-1]
        assert checkpoints.read(newest, "abc").images == int(newest.stem), "what has a checkpoint's name is whole"
        caught += stranded
        if process.returncode == 0 or len(caught) == 2:
            break
    assert caught, "no kill met a checkpoint that was being written"
    assert not (folder.parent / "weights.safetensors").exists(), "killed in the middle"

    assert start(folder.parent).wait(120) == 0
    assert start(tmp_path / "calm").wait(120) == 0
    killed, calm = (load_file(tmp_path / name / "weights.safetensors") for name in ("killed", "calm"))
    assert killed.keys() == calm.keys()
    assert all(torch.equal(killed[name], calm[name]) for name in calm)
    assert not list(folder.glob(".*.part")), "what the kill left behind is gone"
    assert len(checkpoints.find(folder)) == 2
